"""The shipped kinship puzzles and their generator, against a family tree that is walked person by person."""
from __future__ import annotations

import ast
import collections
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from scripts_loader import SCRIPTS, load_script

from stt.dataset import kinship, kinship_text

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "datasets" / "clutrr"
SPLITS = ("train", "val", "test")
TARGETS = {
    "aunt": 0, "son-in-law": 1, "grandfather": 2, "brother": 3, "sister": 4, "father": 5, "mother": 6, "grandmother": 7,
    "uncle": 8, "daughter-in-law": 9, "grandson": 10, "granddaughter": 11, "father-in-law": 12, "mother-in-law": 13,
    "nephew": 14, "son": 15, "daughter": 16, "niece": 17,
}


@pytest.fixture(scope="module")
def script():
    return load_script("make_clutrr")


@pytest.fixture(scope="module")
def shipped():
    return {split: json.loads((SHIPPED / f"{split}.json").read_text()) for split in SPLITS}


# ------------------------------------------------------------------------- the oracle: a family tree and plain claims


class Member:
    """Father, mother, partner and children are made when first looked at; four boys and four girls in every family."""

    def __init__(self, male):
        self.male = male
        self.links = {}

    def look(self, name):
        if name not in self.links:
            {"father": self._birth, "mother": self._birth, "partner": self._wed, "children": self._raise}[name]()
        return self.links[name]

    def _wed(self):
        partner = Member(not self.male)
        self.links["partner"], partner.links["partner"] = partner, self

    def _raise(self):
        self._family([Member(male) for male in (True, False) * 4])

    def _family(self, children):
        husband, wife = (self, self.look("partner")) if self.male else (self.look("partner"), self)
        husband.links["children"] = wife.links["children"] = children
        for child in children:
            child.links["father"], child.links["mother"] = husband, wife

    def _birth(self):
        father = Member(True)
        father._family([self] + [Member(male) for male in (True, False) * 4][1:] + [Member(self.male)])


def parents(x):
    return [x.look("father"), x.look("mother")]


def siblings(x):
    return [child for child in x.look("father").look("children") if child is not x]


def kin(x):
    """(everybody x has a word for, the pair of words) -- male word first."""
    return [
        (parents(x), ("father", "mother")),
        (x.look("children"), ("son", "daughter")),
        (siblings(x), ("brother", "sister")),
        ([x.look("partner")], ("husband", "wife")),
        ([g for p in parents(x) for g in parents(p)], ("grandfather", "grandmother")),
        ([g for c in x.look("children") for g in c.look("children")], ("grandson", "granddaughter")),
        ([s for p in parents(x) for s in siblings(p)], ("uncle", "aunt")),
        ([c for s in siblings(x) for c in s.look("children")], ("nephew", "niece")),
        (parents(x.look("partner")), ("father-in-law", "mother-in-law")),
        ([c.look("partner") for c in x.look("children")], ("son-in-law", "daughter-in-law")),
    ]


def people_called(x, word):
    return [y for people, words in kin(x) if word in words for y in people if y.male == (words.index(word) == 0)]


ROOTS = {"male": Member(True), "female": Member(False)}  # shared by all tests: the tree only grows
WORD = {gender: {id(y): word for people, words in kin(me) for y in people for word in [words[not y.male]]}
        for gender, me in ROOTS.items()}


def all_ends(gender, first, second):
    """The word, or "", for everybody who is `second` of a `first` of me, and not me."""
    me = ROOTS[gender]
    ends = [y for x in people_called(me, first) for y in people_called(x, second) if y is not me]
    return {WORD[gender].get(id(y), "") for y in ends}


def ends_of_random_walks(gender, edges, rng, walks=25):
    """The words for the last person of a chain over random walks through different people."""
    found = set()
    for _ in range(walks):
        walk = [ROOTS[gender]]
        for edge in edges:
            others = [y for y in people_called(walk[-1], edge) if all(y is not z for z in walk)]
            if not others:
                break
            walk.append(rng.choice(others))
        else:
            found.add(WORD[gender].get(id(walk[-1]), ""))
    return found


def test_relation_ids():
    assert {word: index for index, word in enumerate(kinship.RELATIONS)} == TARGETS


def test_two_hop_table_is_what_the_tree_says():
    for first in kinship.EDGES:
        for second in kinship.EDGES:
            words = all_ends("male", first, second) | all_ends("female", first, second)
            expected = words.pop() if len(words) == 1 and "" not in words else None
            assert kinship.compositions().get((first, second)) == expected, (first, second)


@pytest.mark.parametrize(("first", "second", "answer"), [
    ("mother", "brother", "uncle"), ("brother", "daughter", "niece"), ("wife", "mother", "mother-in-law"),
    ("son", "wife", "daughter-in-law"), ("father", "father", "grandfather"), ("daughter", "son", "grandson"),
    ("grandmother", "daughter", None), ("uncle", "son", None), ("brother", "wife", None), ("husband", "wife", None),
    ("son", "grandfather", None),
])
def test_two_hop_table_by_hand(first, second, answer):
    assert kinship.compositions().get((first, second)) == answer


def test_inverse_is_what_the_tree_says():
    for gender, me in ROOTS.items():
        for word in kinship.EDGES:
            for other in people_called(me, word):
                back = [words[not me.male] for people, words in kin(other) if any(me is z for z in people)]
                assert back == [kinship.inverse(word, gender)]


# ---------------------------------------------------------------------------------------------------- shipped items


def test_every_shipped_answer_is_what_the_tree_says(shipped):
    rng = random.Random(0)
    for item in (item for items in shipped.values() for item in items):
        first_gender = item["genders"].split(",")[0].split(":")[1]
        words = ends_of_random_walks(first_gender, ast.literal_eval(item["edge_types"]), rng)
        assert words == {item["target_text"]}, item


def test_every_proof_step_is_a_fact_or_follows_from_two(shipped):
    for item in (item for items in shipped.values() for item in items):
        people = [pair.split(":")[0] for pair in item["genders"].split(",")]
        edges = ast.literal_eval(item["edge_types"])
        facts = {(a, edge, b) for a, edge, b in zip(people[:-1], edges, people[1:], strict=True)}
        steps = ast.literal_eval(item["proof_state"])
        for step in reversed(steps):
            (conclusion, (left, right)), = step.items()
            assert left in facts
            assert right in facts
            assert left[2] == right[0]
            assert conclusion[0] == left[0]
            assert conclusion[2] == right[2]
            assert kinship.compositions()[left[1], right[1]] == conclusion[1]
            facts.add(conclusion)
        assert len(steps) == len(edges) - 1
        assert (people[0], item["target_text"], people[-1]) in facts


def test_story_says_exactly_its_facts(shipped):
    for item in (item for items in shipped.values() for item in items):
        names = [pair.split(":")[0] for pair in item["genders"].split(",")]
        edges = ast.literal_eval(item["edge_types"])
        sentences = item["clean_story"].removesuffix(".").split(". ")
        assert sorted(item["story"].removesuffix(".").split(". ")) == sorted(sentences)
        assert len(sentences) == len(edges) == len(set(names)) - 1
        for sentence, x, edge, y in zip(sentences, names[:-1], edges, names[1:], strict=True):
            assert f"[{x}]" in sentence
            assert f"[{y}]" in sentence
            assert sentence.count("[") == 2
            said = [word for word in kinship.EDGES if f" {word} " in f" {sentence.replace(',', '')} "]
            assert said == [edge], sentence


def test_schema_and_value_types(shipped):
    fields = ["id", "story", "query", "target", "target_text", "clean_story", "proof_state", "f_comb", "task_name",
              "story_edges", "edge_types", "query_edge", "genders", "task_split"]
    for split, items in shipped.items():
        for item in items:
            assert list(item) == fields
            assert all(isinstance(value, int if key == "target" else str) for key, value in item.items())
            hops = len(ast.literal_eval(item["edge_types"]))
            names = [pair.split(":")[0] for pair in item["genders"].split(",")]
            assert ast.literal_eval(item["query"]) == (names[0], names[-1])
            assert ast.literal_eval(item["query_edge"]) == (0, hops)
            assert ast.literal_eval(item["story_edges"]) == [(hop, hop + 1) for hop in range(hops)]
            assert item["f_comb"] == "-".join(ast.literal_eval(item["edge_types"]))
            assert item["target"] == TARGETS[item["target_text"]]
            assert (item["task_name"], item["task_split"]) == (f"task_1.{hops}", split)


def test_sizes_balance_and_no_story_twice(shipped):
    assert {split: len(items) for split, items in shipped.items()} == {"train": 3000, "val": 450, "test": 450}
    everything = [item for items in shipped.values() for item in items]
    for items in shipped.values():
        counts = collections.Counter(item["target"] for item in items)
        assert len(counts) == 18
        assert max(counts.values()) - min(counts.values()) <= 1
    for unique in ("id", "story", "clean_story"):
        assert len({item[unique] for item in everything}) == len(everything)
    assert len({(item["genders"], item["f_comb"]) for item in everything}) == len(everything)


def test_wording_covers_every_template():
    """Each relation is said in at least ten ways, both directions among them, and each of them is drawn."""
    rng = random.Random(0)
    for edge in kinship.EDGES:
        said = {kinship_text.fact("Ann", edge, "Bo", "female", rng) for _ in range(500)}
        assert {f"Ann's {edge} is Bo.", f"Bo is Ann's {edge}."} <= said
        assert len(said) == len(kinship_text.FACTS) + len(kinship_text.SCENES[kinship.KIND[edge]])


# ------------------------------------------------------------------------------------------------------- the script


def test_defaults_remake_the_shipped_files(script, tmp_path):
    assert script.main(["--out", str(tmp_path)]) == 0
    for split in SPLITS:
        assert (tmp_path / f"{split}.json").read_bytes() == (SHIPPED / f"{split}.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.json", "train.json", "val.json"]


def make(script, folder, *flags):
    assert script.main(["--out", str(folder), "--train", "180", "--val", "54", "--test", "54", *flags]) == 0
    return {split: json.loads((folder / f"{split}.json").read_text()) for split in SPLITS}


def test_seed_decides_everything(script, tmp_path):
    first, again, other = (make(script, tmp_path / name, "--seed", seed) for name, seed in
                           (("a", "5"), ("b", "5"), ("c", "6")))
    assert first == again
    assert first != other


def test_hops_mixture(script, tmp_path):
    splits = make(script, tmp_path, "--hops", "2:1,4:3")
    counts = collections.Counter(item["task_name"] for item in splits["train"])
    assert 36 <= counts["task_1.2"] <= 54
    assert counts["task_1.2"] + counts["task_1.4"] == 180


def test_names_disjoint(script, tmp_path):
    splits = make(script, tmp_path, "--disjoint", "names")
    names = {split: {name for item in items for name in item["genders"].split(",")} for split, items in splits.items()}
    assert not names["train"] & (names["val"] | names["test"])
    assert not names["val"] & names["test"]


def test_combinations_disjoint(script, tmp_path):
    splits = make(script, tmp_path, "--disjoint", "combinations")
    combinations = {split: {item["f_comb"] for item in items} for split, items in splits.items()}
    assert not combinations["train"] & (combinations["val"] | combinations["test"])
    assert not combinations["val"] & combinations["test"]
    for items in splits.values():
        assert len({item["target"] for item in items}) == 18


@pytest.mark.parametrize(("flags", "message"), [
    (["--hops", "5"], "numbers from 2 to 4"),
    (["--hops", "2:0"], "weights above 0"),
    (["--hops", "2,2"], "different numbers"),
    (["--train", "0"], "--train must be 1 or more, got 0"),
    (["--test", "many"], "--test must be a whole number, got 'many'"),
    (["--seed", "-1"], "--seed must be 0 or more"),
    (["--disjoint", "name"], "Did you mean 'names'"),
    (["--apart_from", "nowhere"], "--apart_from must be a folder this program wrote"),
    (["--colour", "red"], "unknown flag '--colour'"),
    (["--disjoint", "names", "--hops", "2", "--test", "50000"], "ask for fewer"),
])
def test_bad_input_writes_nothing(script, tmp_path, capsys, flags, message):
    assert script.main(["--out", str(tmp_path / "new"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_apart_from_other_files(script, tmp_path):
    """The same seed makes the same stories, unless they are to be kept apart: then none is made twice."""
    def made(name, *flags):
        sizes = ["--seed", "3", "--train", "18", "--val", "18", "--test", "36"]
        assert script.main(["--out", str(tmp_path / name), *sizes, *flags]) == 0
        return {row["story"] for split in SPLITS for row in json.loads((tmp_path / name / f"{split}.json").read_text())}

    first = made("first")
    assert made("again") == first
    apart = made("apart", "--apart_from", str(tmp_path / "first"))
    assert len(apart) == 72
    assert not apart & first


def test_out_below_a_file(script, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert script.main(["--out", str(tmp_path / "file" / "below")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_script_runs_on_its_own_and_helps(tmp_path):
    shown = subprocess.run([sys.executable, str(SCRIPTS / "make_clutrr"), "--help"], capture_output=True, text=True,
                           cwd=tmp_path)
    assert shown.returncode == 0
    assert "--disjoint" in shown.stdout
    assert "examples:" in shown.stdout
