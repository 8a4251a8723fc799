"""The sentences of the kinship world: names, fact templates, stories and the text `models/stt-tiny` is pre-trained on.

All wording is our own. A fact template says "{Y} is {X}'s {r}"; {his} and {he} belong to {X}, {yhe} to {Y}.
"""
from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from stt.dataset import kinship
from stt.dataset.kinship import Chain

NAMES = {
    "male": (
        "Adam", "Alan", "Ben", "Carl", "Dan", "David", "Eric", "Frank", "Fred", "Gary", "George", "Henry", "Hugo",
        "Ian", "Ivan", "Jack", "James", "John", "Keith", "Kevin", "Leo", "Louis", "Luke", "Mark", "Max", "Mike", "Neil",
        "Nick", "Noah", "Oscar", "Owen", "Paul", "Peter", "Ray", "Ryan", "Sam", "Sean", "Simon", "Tom", "Tony",
    ),
    "female": (
        "Alice", "Amy", "Anna", "Beth", "Carol", "Clara", "Daisy", "Diana", "Ella", "Emily", "Emma", "Erin", "Eva",
        "Fiona", "Gina", "Hanna", "Helen", "Irene", "Iris", "Jane", "Joan", "Judy", "Julia", "Karen", "Kate", "Laura",
        "Linda", "Lisa", "Lucy", "Maria", "Mary", "Nancy", "Nina", "Nora", "Paula", "Rosa", "Ruth", "Sara", "Susan",
        "Tina",
    ),
}
PRONOUNS = {"male": ("he", "his", "him"), "female": ("she", "her", "her")}

FACTS = (  # fit every relation
    "{X}'s {r} is {Y}.",
    "{Y} is {X}'s {r}.",
    "{X} and {his} {r} {Y} had lunch.",
    "{X} called {his} {r}, {Y}.",
    "{Y} is the {r} of {X}.",
    "{X} has a {r} named {Y}.",
    "{X}'s {r} {Y} came to visit.",
    "{Y} met {X}, whose {r} {yhe} is.",
    "{X} wrote a letter to {his} {r} {Y}.",
    "{Y} helps {X}, as a good {r} does.",
)
SCENES = {  # kind of relation -> little scenes that only fit it
    "parent": ("{X} asked {his} {r} {Y} for help.", "{Y}, the {r} of {X}, cooked dinner.",
               "{X} learned to swim from {his} {r} {Y}."),
    "child": ("{X} drove {his} {r} {Y} to school.", "{X} is proud of {Y}, {his} {r}.",
              "{Y} baked a cake with {X}, who loves {his} {r}."),
    "sibling": ("{X} shares a room with {his} {r} {Y}.", "{X} raced {his} {r} {Y} to the gate.",
                "{Y} grew up with {X} and is {his} {r}."),
    "spouse": ("{X} danced with {his} {r} {Y}.", "{X} married {Y}, now {his} {r}.",
               "{X} and {his} {r} {Y} bought a house."),
    "grandparent": ("{X} spends the summer with {his} {r} {Y}.", "{Y} reads to {X}, and is {his} {r}.",
                    "Old {Y} is the {r} of {X}."),
    "grandchild": ("{X} knits a hat for {his} {r} {Y}.", "{X} tells old tales to {his} {r} {Y}.",
                   "Little {Y} is the {r} of {X}."),
    "parents' sibling": ("{X} stays on the farm of {his} {r} {Y}.", "{X} got a bike from {his} {r} {Y}.",
                         "{Y} is a fun {r} to {X}."),
    "sibling's child": ("{X} plays chess with {his} {r} {Y}.", "{X} sent a gift to {his} {r} {Y}.",
                        "{Y} is the dear {r} of {X}."),
    "parent-in-law": ("{X} plants roses with {his} {r} {Y}.", "{X} fears {his} {r} {Y} a little.",
                      "{Y} gave {X} advice as a {r}."),
    "child-in-law": ("{X} likes {his} new {r} {Y}.", "{X} toasted {his} {r} {Y}.",
                     "{Y} joined the family as {r} of {X}."),
}


def random_people(chain: Chain, names: dict[str, tuple[str, ...]], rng: random.Random) -> tuple[list[str], list[str]]:
    """Different names for the people of a chain, and their genders."""
    genders = [rng.choice(kinship.first_genders(chain)), *(kinship.GENDER[edge] for edge in chain)]
    pools = {gender: rng.sample(pool, genders.count(gender)) for gender, pool in names.items()}
    return [pools[gender].pop() for gender in genders], genders


def fact(x: str, relation: str, y: str, x_gender: str, rng: random.Random) -> str:
    """One sentence saying that y is x's `relation`."""
    template = rng.choice(FACTS + SCENES[kinship.KIND[relation]])
    he, his, _ = PRONOUNS[x_gender]
    return template.format(X=x, Y=y, r=relation, he=he, his=his, yhe=PRONOUNS[kinship.GENDER[relation]][0])


def story(names: list[str], genders: list[str], chain: Chain, rng: random.Random) -> list[str]:
    """One sentence per edge of the chain, in the order of the chain."""
    people = zip(names[:-1], names[1:], genders[:-1], strict=True)
    return [fact(x, edge, y, gender, rng) for (x, y, gender), edge in zip(people, chain, strict=True)]


# ------------------------------------------------------------------------------------------------- pre-training text

SHARES = {"facts": 0.45, "chains": 0.10, "rules": 0.15, "general": 0.30}  # of the documents, not of the tokens
ASIDES = (  # says again that y is x's r; none of them is the wording of the task's prompt
    "Who is {X}'s {r}? {Y}.",
    '{X} calls {Y} "{r}".',
    "Whose {r} is {Y}? {X}'s.",
    "Then {Y} is the {r} of {X}.",
    "So {X} has {Y} as {r}.",
    "To {X}, {Y} is a {r}.",
)
RULES = (
    "My {a}'s {b} is my {c}.",
    "The {b} of my {a} is my {c}.",
    "What is your {a}'s {b} to you? My {c}.",
    "If I have a {a}, the {b} of my {a} is a {c} of mine.",
)
GENERAL = (
    "{N} is a {noun}.",
    "{N} likes {food}, and {he} has a {colour} {thing}.",
    "In the {time} {N} walks to the {place} with {his} {pet}.",
    "The {pet} of {N} is {colour} and sleeps in the {place}.",
    "{N} went to the {place} and bought {food} for {his} {pet}.",
    "It was {weather} in the {time}, so {N} stayed at the {place}.",
    "Where is {N}? {He} is at the {place}.",
    "{N} gave {M} a {colour} {thing}, and {M} gave {him} {food}.",
    "Every {time} {N} and {M} meet at the {place}.",
    "Is {N} a man or a woman? A {noun}.",
)
WORDS = {
    "food": ("tea", "milk", "bread", "apples", "soup", "cheese", "honey", "rice"),
    "colour": ("red", "blue", "green", "white", "black", "brown", "yellow"),
    "thing": ("car", "boat", "chair", "book", "coat", "ball", "lamp", "bag"),
    "time": ("morning", "evening", "summer", "winter", "spring", "afternoon"),
    "place": ("park", "river", "shop", "market", "garden", "station", "library", "beach"),
    "pet": ("dog", "cat", "horse", "bird"),
    "weather": ("cold", "hot", "raining", "windy", "dark"),
}
NOUNS = {"male": "man", "female": "woman"}


@dataclass(frozen=True)
class Document:
    """One piece of pre-training text; `people` and `chain` say which chain it tells, if it tells one."""

    kind: str
    text: str
    people: tuple[str, ...] = ()
    chain: Chain = ()


def documents(rng: random.Random, held_out: Collection[tuple[tuple[str, ...], Chain]] = ()) -> Iterator[Document]:
    """Endless pre-training documents in the proportions of `SHARES`, none about a (people, chain) of `held_out`."""
    write = {"facts": _facts, "chains": _chains, "rules": _rules, "general": _general}
    while True:
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        document = write[kind](rng)
        if (document.people, document.chain) not in held_out:
            yield document


def _aside(x: str, relation: str, y: str, rng: random.Random) -> str:
    return rng.choice(ASIDES).format(X=x, r=relation, Y=y)


def _facts(rng: random.Random) -> Document:
    """Up to four unrelated facts, then one or two of them again, as they are or seen from the other side."""
    count = rng.randint(1, 4)
    people = [(name, gender) for gender, names in NAMES.items() for name in rng.sample(names, count)]
    rng.shuffle(people)
    told = []
    for (x, x_gender), (y, y_gender) in zip(people[::2], people[1::2], strict=True):
        fits = [edge for edge in kinship.EDGES if kinship.GENDER[edge] == y_gender]
        if x_gender == y_gender:
            fits = [edge for edge in fits if kinship.KIND[edge] != "spouse"]
        told.append((x, rng.choice(fits), y, x_gender))
    sentences = [fact(*one, rng) for one in told]
    for x, relation, y, x_gender in rng.sample(told, min(count, rng.randint(1, 2))):
        seen_from_y = (y, kinship.inverse(relation, x_gender), x)
        sentences.append(_aside(*((x, relation, y) if rng.random() < 0.5 else seen_from_y), rng))
    return Document("facts", " ".join(sentences))


def _chains(rng: random.Random) -> Document:
    """A story as in the data set, then up to three of the relations that follow from it."""
    hops = rng.choices((2, 3, 4), (5, 3, 2))[0]
    chain = rng.choice(kinship.chains(hops)[rng.choice(kinship.RELATIONS)])
    people, genders = random_people(chain, NAMES, rng)
    sentences = rng.sample(story(people, genders, chain, rng), hops)
    spans = [(start, end) for start in range(hops) for end in range(start + 2, hops + 1)]
    follows = [(start, relation, end) for start, end in spans if (relation := kinship.fold(chain[start:end]))]
    chosen = rng.sample(follows, min(len(follows), rng.randint(1, 3)))
    asides = [_aside(people[start], relation, people[end], rng) for start, relation, end in chosen]
    return Document("chains", " ".join(sentences + asides), tuple(people), chain)


def _rules(rng: random.Random) -> Document:
    """Three compositions, without names."""
    pairs = rng.sample(sorted(kinship.compositions().items()), 3)
    return Document("rules", " ".join(rng.choice(RULES).format(a=a, b=b, c=c) for (a, b), c in pairs))


def _general(rng: random.Random) -> Document:
    """Two or three sentences about everyday things, each with its own people."""
    sentences = []
    for template in rng.sample(GENERAL, rng.randint(2, 3)):
        gender = rng.choice(kinship.GENDERS)
        he, his, him = PRONOUNS[gender]
        name, other = rng.sample(NAMES[gender], 2)
        words = {kind: rng.choice(choices) for kind, choices in WORDS.items()}
        sentences.append(template.format(N=name, M=other, he=he, He=he.capitalize(), his=his, him=him,
                                         noun=NOUNS[gender], **words))
    return Document("general", " ".join(sentences))
