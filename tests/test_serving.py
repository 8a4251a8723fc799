"""Widths that serve: buckets against brute force, what the kept units are, and what an export for a runtime costs."""
from __future__ import annotations

import itertools
import json
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SHIPPED, results, run
from tiny_text import build_decoder
from transformers import AutoModelForCausalLM, AutoTokenizer

import stt
from stt import modes, serving, verbs
from stt.arguments import CHECKOUT
from stt.cli import read_args
from stt.errors import InputError
from stt.llm_arguments import LLMArgs
from stt.selecting import Budget, composition, kept, measure

LAYERS = 6
BATCHES = list(torch.randint(3, 60, (3, 2, 9), generator=torch.Generator().manual_seed(1)))
COUNTS = dict(zip((f"model.layers.{i}.mlp" for i in range(LAYERS)), (9, 40, 21, 22, 38, 12), strict=True))


@pytest.fixture(scope="module")
def measured():
    return measure(build_decoder(60, LAYERS), BATCHES, None, ["stt", "magnitude"], progress=False)


# ---------------------------------------------------------------- whole numbers


@pytest.mark.parametrize(("width", "most"), [("free", None), ("uniform", 1), ("buckets:1", 1), ("buckets:12", 12)])
def test_names_of_widths(width: str, most: int | None) -> None:
    assert serving.most_widths(width) == most


@pytest.mark.parametrize("width", ["", "Uniform", "buckets", "buckets:", "buckets:0", "buckets:-1", "buckets:2.5",
                                   "buckets: 2", "buckets:2 ", "3", 3, None])
def test_other_names_are_refused(width: object) -> None:
    with pytest.raises(InputError, match="width must be free, uniform or buckets:N with N of 1 or more, got"):
        serving.most_widths(width)
    with pytest.raises(InputError, match="width must be free"):
        Budget(width=width)


@pytest.mark.parametrize("multiple_of", [0, -8, 1.5, "8", True])
def test_wrong_multiples_are_refused(multiple_of: object) -> None:
    with pytest.raises(InputError, match="multiple_of must be a whole number of at least 1, got"):
        Budget(multiple_of=multiple_of)


def least_cost(counts: list[int], most: int) -> int:
    """Of all sets of widths: the least sum of squared moves, every count going to the nearest."""
    widths = range(min(counts), max(counts) + 1)
    return min(sum(min((count - width)**2 for width in chosen) for count in counts)
               for chosen in itertools.combinations(widths, min(most, len(widths))))


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_buckets_cost_the_least_of_all(most: int) -> None:
    drawn = random.Random(most)
    for _ in range(60):
        counts = [drawn.randint(1, 14) for _ in range(drawn.randint(1, 8))]
        moved = serving.buckets(counts, most)
        assert sum((a - b)**2 for a, b in zip(counts, moved, strict=True)) == least_cost(counts, most), counts
        assert len(set(moved)) <= most
        assert len({*zip(counts, moved, strict=True)}) == len(set(counts))  # equal counts stay equal
        assert abs(sum(moved) - sum(counts)) <= len(counts) / 2


def test_enough_buckets_change_nothing() -> None:
    counts = [5, 9, 5, 1, 70]
    for most in (4, 5, 100):
        assert serving.buckets(counts, most) == counts


def test_one_bucket_is_the_rounded_mean() -> None:
    assert serving.buckets([1, 2], 1) == [2, 2]
    assert serving.buckets([1, 1, 2], 1) == [1, 1, 1]
    assert serving.buckets([10, 20, 90], 1) == [40, 40, 40]


def test_many_sites_are_soon_done() -> None:
    drawn = random.Random(0)
    counts = [drawn.randint(100, 700) for _ in range(20_000)]
    moved = serving.buckets(counts, 4)
    assert len(set(moved)) == 4


@pytest.mark.parametrize(("width", "multiple_of"), [
    (width, multiple) for width in ("free", "uniform", "buckets:2") for multiple in (1, 8, 64)])
def test_sites_of_another_dense_width_are_dealt_with_apart(width: str, multiple_of: int) -> None:
    counts = {"a": 10, "x": 70, "b": 31, "y": 99, "c": 29, "z": 71}
    dense = {site: 40 if site in "abc" else 100 for site in counts}
    found = serving.served(counts, dense, width, multiple_of)
    assert list(found) == list(counts)
    plain = {"free": counts, "uniform": {"a": 23, "b": 23, "c": 23, "x": 80, "y": 80, "z": 80},
             "buckets:2": {"a": 10, "b": 30, "c": 30, "x": 71, "y": 99, "z": 71}}[width]
    for site, count in found.items():
        at_least = [n for n in range(1, dense[site] + 1) if n >= plain[site] and n % multiple_of == 0]
        assert count == min([*at_least, dense[site]])
    assert serving.served(found, dense, width, multiple_of) == found


# ---------------------------------------------------------------- from scores to a selection


def taking_turns(scores: list[torch.Tensor], count: int) -> list[int]:
    """The best of each score in turn, until there are `count`."""
    queues = [sorted(range(len(score)), key=lambda i, s=score: (-s[i].item(), i)) for score in scores]
    found: dict[int, None] = {}
    for unit in itertools.chain.from_iterable(zip(*queues, strict=True)):
        if len(found) < count:
            found[unit] = None
    return sorted(found)


@pytest.mark.parametrize("size", [Budget(0.3), Budget(0.1), Budget(keep_ratio=0.4)], ids=["union", "few", "exact"])
@pytest.mark.parametrize("method", ["stt", "magnitude"])
def test_uniform_keeps_the_best_so_many_of_every_site(measured, size: Budget, method: str) -> None:
    free = kept(measured, method, size)
    uniform = kept(measured, method, Budget(size.topk_ratio, size.keep_ratio, width="uniform"))
    mean = Fraction(sum(map(len, free.values())), LAYERS)
    count = int(mean + Fraction(1, 2))
    names = ("activation_mean", "activation_rate") if method == "stt" else ("magnitude",)
    for site, ids in uniform.items():
        assert ids.tolist() == taking_turns([measured.scores[name][site] for name in names], count)
        fewer, more = sorted((set(ids.tolist()), set(free[site].tolist())), key=len)
        assert fewer <= more
    assert (uniform.meta["width"], free.meta["width"], free.meta["multiple_of"]) == ("uniform", "free", 1)
    assert all(sum(parts.values()) == count for parts in composition(measured, kept(measured, "stt", Budget(
        size.topk_ratio, size.keep_ratio, dict.fromkeys(free, count), width="uniform"))).values())


def test_the_counts_of_a_free_union_differ(measured) -> None:
    """Else the tests of uniform widths would say nothing."""
    assert len({len(ids) for ids in kept(measured, "stt", Budget(0.3)).values()}) > 2


def test_buckets_and_multiples_of_a_selection(measured) -> None:
    def sizes(**changes: object) -> list[int]:
        return [len(ids) for ids in kept(measured, "stt", Budget(counts=COUNTS, **changes)).values()]

    assert sizes() == list(COUNTS.values())
    assert sizes(width="buckets:3") == [11, 39, 22, 22, 39, 11]
    assert sizes(width="buckets:2", multiple_of=8) == [16, 40, 16, 16, 40, 16]
    assert sizes(multiple_of=60) == [60] * LAYERS
    assert sizes(multiple_of=50) == [50] * LAYERS
    assert sizes(multiple_of=100) == [64] * LAYERS  # the dense width


def test_a_ranking_over_all_sites_is_evened_out_too(measured) -> None:
    free = kept(measured, "magnitude", Budget(keep_ratio=0.3, across_sites=True))
    assert len({len(ids) for ids in free.values()}) > 2
    even = kept(measured, "magnitude", Budget(keep_ratio=0.3, across_sites=True, width="buckets:2"))
    assert len({len(ids) for ids in even.values()}) == 2
    for site, ids in even.items():
        assert ids.tolist() == taking_turns([measured.scores["magnitude"][site]], len(ids))


@pytest.mark.parametrize("name", [name for name, mode in modes.MODES.items() if mode.score])
def test_every_mode_gets_the_same_widths(name: str) -> None:
    found, composed = modes.select_units(modes.find(name), build_decoder(60, LAYERS), BATCHES, None,
                                         Budget(0.3, width="buckets:2", multiple_of=4), 0.01, seed=0)
    free, _ = modes.select_units(modes.find("stt"), build_decoder(60, LAYERS), BATCHES, None, Budget(0.3), 0.01, seed=0)
    expected = serving.buckets([len(ids) for ids in free.values()], 2)
    assert [len(ids) for ids in found.values()] == [-(-count // 4) * 4 for count in expected]
    assert (found.meta["width"], found.meta["multiple_of"]) == ("buckets:2", 4)
    assert all(sum(composed[site].values()) == len(found[site]) for site in composed)


def test_select_starts_from_the_sizes_it_is_given(tmp_path: Path) -> None:
    model = build_decoder(60, LAYERS)
    selection = stt.select(model, BATCHES, keep=COUNTS, width="uniform", multiple_of=4)
    assert {len(ids) for ids in selection.values()} == {24}
    selection.save(tmp_path / "s")
    assert stt.Selection.load(tmp_path / "s").meta["width"] == "uniform"
    again = stt.select(model, score="random", keep=selection)
    assert {len(ids) for ids in again.values()} == {24}


# ---------------------------------------------------------------- export


def stored_bytes(folder: Path) -> int:
    return sum(value.nbytes for value in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("width", ["free", "uniform"])
def test_the_padding_of_an_export(width: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Uniform widths need no padding; free ones do."""
    model = build_decoder(60, LAYERS)
    stt.apply(model, stt.select(model, BATCHES, keep=COUNTS, width=width))
    stt.save(model, tmp_path / "sliced")
    caplog.set_level("INFO")
    assert verbs.main(["export", str(tmp_path / "sliced"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    before, after = stored_bytes(tmp_path / "sliced"), stored_bytes(tmp_path / "hf")
    assert (after <= 1.02 * before) == (width == "uniform")
    added = sum(3 * 32 * 4 * (40 - count) for count in COUNTS.values()) if width == "free" else 0
    assert after - before == added
    assert f"padding adds {added:,} bytes to the {before:,} of the kept weights, {100 * added / before:.2f} %" \
        in caplog.text


@pytest.mark.parametrize(("width", "most"), [("uniform", 1.02), ("free", 1.5)])
def test_the_padding_of_a_real_selection(width: str, most: float, tmp_path: Path) -> None:
    """The shipped model on the shipped stories: the plain folder is next to as large as what is kept, or is not."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(SHIPPED), AutoTokenizer.from_pretrained(SHIPPED)
    rows = json.loads((CHECKOUT / "datasets" / "clutrr" / "train.json").read_text(encoding="utf-8"))
    stories = [row["clean_story"] for row in rows[:32]]
    stt.apply(model, stt.select(model, stories, tokenizer, topk_ratio=0.2, width=width))
    stt.save(model, tmp_path / "sliced", tokenizer)
    assert verbs.main(["export", str(tmp_path / "sliced"), "--out", str(tmp_path / "hf")]) == 0
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in ("sliced", "hf")]
    assert sizes[0] < (SHIPPED / "model.safetensors").stat().st_size
    assert (sizes[1] <= 1.02 * sizes[0]) == (width == "uniform")
    assert sizes[1] <= most * sizes[0]
    ids = tokenizer(stories[0], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.eval()(ids).logits
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(ids).logits, expected, rtol=0,
                                   atol=1e-4)


@pytest.mark.parametrize(("runtime", "tp", "multiple"), [(None, 1, 1), ("vllm", 1, 8), ("vllm", 4, 32),
                                                         ("awq", 1, 128), ("awq", 2, 256), ("gguf", 1, 256)])
def test_what_a_runtime_needs(runtime: str | None, tp: int, multiple: int) -> None:
    assert serving.multiple_for(runtime, tp) == multiple
    serving.check_served(runtime, tp, [multiple, 3 * multiple])
    if multiple > 1:
        with pytest.raises(InputError, match=f"{runtime} with tp {tp} needs .* multiples of {multiple}, and this model "
                                             f"can only have {multiple + 1}: .*--multiple_of {multiple}, or"):
            serving.check_served(runtime, tp, [multiple, multiple + 1])


@pytest.mark.parametrize(("runtime", "tp", "said"), [
    ("vlm", 1, "unknown runtime 'vlm'. Did you mean 'vllm'"), ("awq", 0, "tp must be a whole number of at least 1"),
    ("awq", 2.0, "tp must be a whole number"), ("gguf", 2, "tp 2 splits the width over ranks.*vllm and awq only"),
    (None, 2, "tp 2 splits the width")])
def test_ranks_and_runtimes_that_do_not_fit(runtime: str | None, tp: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        serving.multiple_for(runtime, tp)


# ---------------------------------------------------------------- from the recipe to a folder for llama.cpp


def test_a_run_of_uniform_width_becomes_a_folder_for_llama_cpp(small, tmp_path: Path) -> None:
    assert run(small, tmp_path, "--width", "uniform", "--multiple_of", "4", "--num_epoch", "1", "--no_eval_epochs") == 0
    (count,) = {site["kept"] for site in results(tmp_path)["sites"]}
    assert count % 4 == 0
    checkpoint, out = tmp_path / "run" / "checkpoint", tmp_path / "gguf"
    assert verbs.main(["export", str(checkpoint), "--out", str(out), "--for", "gguf"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["intermediate_size"] == 256
    assert "quantization_config" not in config
    dense, plain = load_file(SHIPPED / "model.safetensors"), load_file(out / "model.safetensors")
    assert plain.keys() == dense.keys()
    assert {tuple(plain[name].shape) for name in plain if "mlp" in name} == {(256, 128), (128, 256)}
    assert not plain["model.layers.0.mlp.up_proj.weight"][count:].any()
    assert (out / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    ids = AutoTokenizer.from_pretrained(out)("The sea is blue.", return_tensors="pt").input_ids
    expected = stt.load(checkpoint)(ids).logits
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(out)(ids).logits, expected, rtol=0, atol=1e-4)


def test_the_commands_of_the_page_are_read() -> None:
    page = (CHECKOUT / "docs" / "shipping.md").read_text(encoding="utf-8")
    lines = [line.partition("#")[0].split() for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
             for line in block.splitlines()]
    exports = [read_args(verbs.ExportArgs, line[2:]) for line in lines if line[:2] == ["stt", "export"]]
    runs = [read_args(LLMArgs, line[2:]) for line in lines if line[:2] == ["python", "train_llm.py"]]
    assert [(args.to, args.runtime, args.tp, args.multiple_of) for args in exports] == [
        ("hf", None, 1, 1), ("hf", None, 1, 64), ("hf", "vllm", 2, 1), ("hf", "gguf", 1, 1)]
    assert [(args.width, args.multiple_of) for args in runs] == [("uniform", 1), ("buckets:3", 64)]
