"""The kinship world behind `datasets/clutrr` and `models/stt-tiny`: relations, how two of them combine, and chains.

Everywhere, a fact (X, relation, Y) means "Y is X's relation". Aunt, uncle, niece and nephew are by blood; everybody
marries once and there are no half-siblings, so a composition has one answer or is left out. The schema of an item is
CLUTRR's (Sinha et al. 2019, arxiv.org/abs/1908.06177); the rules are enumerated here and the sentences are our own.
"""
from __future__ import annotations

import itertools
from functools import cache

Chain = tuple[str, ...]
Fact = tuple[str, str, str]

RELATIONS = (  # the position is the target id of the data files
    "aunt", "son-in-law", "grandfather", "brother", "sister", "father", "mother", "grandmother", "uncle",
    "daughter-in-law", "grandson", "granddaughter", "father-in-law", "mother-in-law", "nephew", "son", "daughter",
    "niece",
)
EDGES = (*RELATIONS, "husband", "wife")  # what a story may say; husband and wife are never asked for
KINDS = {  # kind of relation -> its (male, female) words
    "parent": ("father", "mother"),
    "child": ("son", "daughter"),
    "sibling": ("brother", "sister"),
    "spouse": ("husband", "wife"),
    "grandparent": ("grandfather", "grandmother"),
    "grandchild": ("grandson", "granddaughter"),
    "parents' sibling": ("uncle", "aunt"),
    "sibling's child": ("nephew", "niece"),
    "parent-in-law": ("father-in-law", "mother-in-law"),
    "child-in-law": ("son-in-law", "daughter-in-law"),
}
KIND = {word: kind for kind, words in KINDS.items() for word in words}
GENDERS = ("male", "female")
GENDER = {word: gender for words in KINDS.values() for gender, word in zip(GENDERS, words, strict=True)}
INVERSE_KIND = {
    "parent": "child", "child": "parent", "sibling": "sibling", "spouse": "spouse", "grandparent": "grandchild",
    "grandchild": "grandparent", "parents' sibling": "sibling's child", "sibling's child": "parents' sibling",
    "parent-in-law": "child-in-law", "child-in-law": "parent-in-law",
}
MAX_HOPS = 4
_CHILDREN_OF_EACH_GENDER = 3  # enough for "another brother of my brother", who is not me


def inverse(relation: str, gender: str) -> str:
    """The word for X seen from Y, given that Y is X's `relation` and X has `gender`."""
    return KINDS[INVERSE_KIND[KIND[relation]]][GENDERS.index(gender)]


# ---------------------------------------------------------------------------------------------- the endless family


class Person:
    """A member of a family without end: parents, spouse and children come into being when they are asked for."""

    def __init__(self, gender: str) -> None:
        self.gender = gender
        self._parents: list[Person] = []
        self._spouse: Person | None = None
        self._children: list[Person] = []

    def parents(self) -> list[Person]:
        """Father and mother; their other children appear with them."""
        if not self._parents:
            father = Person("male")
            father._have_children(first=self)
        return self._parents

    def spouse(self) -> Person:
        """The one husband or wife."""
        if self._spouse is None:
            self._spouse = Person(GENDERS[1 - GENDERS.index(self.gender)])
            self._spouse._spouse = self
        return self._spouse

    def children(self) -> list[Person]:
        """All children, who are the spouse's children too."""
        if not self._children:
            self._have_children(first=None)
        return self._children

    def siblings(self) -> list[Person]:
        """The other children of the parents."""
        return [child for child in self.parents()[0].children() if child is not self]

    def _have_children(self, first: Person | None) -> None:
        children = [Person(gender) for gender in GENDERS for _ in range(_CHILDREN_OF_EACH_GENDER)]
        if first is not None:
            children[_CHILDREN_OF_EACH_GENDER * GENDERS.index(first.gender)] = first
        couple = sorted((self, self.spouse()), key=lambda person: GENDERS.index(person.gender))
        for child in children:
            child._parents = couple
        for parent in couple:
            parent._children = children


def relatives(person: Person, relation: str) -> list[Person]:
    """Everybody who is `person`'s `relation`."""
    kind = KIND[relation]
    if kind == "parent":
        found = person.parents()
    elif kind == "child":
        found = person.children()
    elif kind == "sibling":
        found = person.siblings()
    elif kind == "spouse":
        found = [person.spouse()]
    elif kind == "grandparent":
        found = [old for parent in person.parents() for old in parent.parents()]
    elif kind == "grandchild":
        found = [young for child in person.children() for young in child.children()]
    elif kind == "parents' sibling":
        found = [other for parent in person.parents() for other in parent.siblings()]
    elif kind == "sibling's child":
        found = [child for sibling in person.siblings() for child in sibling.children()]
    elif kind == "parent-in-law":
        found = person.spouse().parents()
    else:
        found = [child.spouse() for child in person.children()]
    return [other for other in found if other.gender == GENDER[relation]]


# ---------------------------------------------------------------------------------------------------- composition


@cache
def compositions() -> dict[tuple[str, str], str]:
    """(first, second) -> the one word for "my first's second", found by enumeration of the endless family.

    A pair is left out when it has two answers (a grandmother's daughter: mother or aunt), when an answer has no word
    among `EDGES` (an uncle's son) or when it always leads back to oneself (a husband's wife).
    """
    answers: dict[tuple[str, str], set[str]] = {}
    for gender in GENDERS:
        me = Person(gender)
        word_for = {id(other): relation for relation in EDGES for other in relatives(me, relation)}
        for first, second in itertools.product(EDGES, repeat=2):
            ends = [end for middle in relatives(me, first) for end in relatives(middle, second) if end is not me]
            answers.setdefault((first, second), set()).update(word_for.get(id(end), "") for end in ends)
    return {pair: min(words) for pair, words in answers.items() if len(words) == 1 and "" not in words}


def fold(chain: Chain) -> str | None:
    """The relation of the last person of a chain to the first, or None when no order of compositions gives one."""
    return _folded(tuple(chain))[0]


@cache
def _folded(chain: Chain) -> tuple[str | None, int]:
    """The folded relation and where the last composition cuts the chain."""
    if len(chain) == 1:
        return chain[0], 0
    for cut in range(1, len(chain)):
        left, right = _folded(chain[:cut])[0], _folded(chain[cut:])[0]
        answer = compositions().get((left or "", right or ""))
        if answer is not None:
            return answer, cut
    return None, 0


def proof(names: Chain, chain: Chain) -> list[dict[Fact, list[Fact]]]:
    """The compositions that answer a chain, last one first, each as {conclusion: [its two facts]}."""
    relation, cut = _folded(tuple(chain))
    if len(chain) == 1 or relation is None:
        return []
    left = (names[0], str(fold(chain[:cut])), names[cut])
    right = (names[cut], str(fold(chain[cut:])), names[-1])
    step = {(names[0], relation, names[-1]): [left, right]}
    return [step, *proof(names[: cut + 1], chain[:cut]), *proof(names[cut:], chain[cut:])]


@cache
def first_genders(chain: Chain) -> tuple[str, ...]:
    """The genders the first person may have so that all people of the chain are different; empty if none."""
    return tuple(gender for gender in GENDERS if _has_distinct_walk([Person(gender)], chain))


def _has_distinct_walk(people: list[Person], chain: Chain) -> bool:
    if not chain:
        return True
    return any(
        _has_distinct_walk([*people, other], chain[1:])
        for other in relatives(people[-1], chain[0])
        if all(other is not person for person in people)
    )


@cache
def chains(hops: int) -> dict[str, tuple[Chain, ...]]:
    """Target relation -> every chain of `hops` edges that folds to it and that different people can live in."""
    found: dict[str, list[Chain]] = {relation: [] for relation in RELATIONS}
    for chain, target in _foldable(hops).items():
        if target in found and first_genders(chain):
            found[target].append(chain)
    return {target: tuple(sorted(group)) for target, group in found.items()}


@cache
def _foldable(hops: int) -> dict[Chain, str]:
    if hops == 1:
        return {(edge,): edge for edge in EDGES}
    found: dict[Chain, str] = {}
    for cut in range(1, hops):
        for (left, a), (right, b) in itertools.product(_foldable(cut).items(), _foldable(hops - cut).items()):
            answer = compositions().get((a, b))
            if answer is not None:
                found[left + right] = answer
    return found
