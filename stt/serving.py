"""Widths that serve: the number of units each site keeps when few shapes are wanted, and what runtimes need of a width.

Whole numbers only, and nothing heavy is imported: command lines are checked with it too.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from stt.errors import InputError, unknown_name


@dataclass(frozen=True)
class Runtime:
    """What a runtime wants of a width: a `multiple`, of each rank's part of it if ranks split it (docs/shipping.md says
    where the numbers come from)."""

    multiple: int
    is_split: bool


EXPERTS = 8  # units: 16 bytes in half precision, what transformers' grouped product needs of a row
RUNTIMES = {"vllm": Runtime(8, is_split=True), "awq": Runtime(128, is_split=True), "gguf": Runtime(256, is_split=False)}


# ---------------------------------------------------------------- at selection


def most_widths(width: str) -> int | None:
    """How many different widths `width` allows: "free" any number (None), "uniform" 1, "buckets:N" N.

    Raises InputError for anything else.
    """
    if width in ("free", "uniform"):
        return None if width == "free" else 1
    found = re.fullmatch(r"buckets:([1-9][0-9]*)", str(width))
    if found is None:
        raise InputError(f"width must be free, uniform or buckets:N with N of 1 or more, got {width!r}")
    return int(found[1])


def check_multiple(multiple_of: int) -> int:
    """The number itself; InputError unless it is a whole number of at least 1."""
    if type(multiple_of) is not int or multiple_of < 1:
        raise InputError(f"multiple_of must be a whole number of at least 1, got {multiple_of}")
    return multiple_of


def served(counts: Mapping[str, int], dense: Mapping[str, int], width: str, multiple_of: int = 1) -> dict[str, int]:
    """The units every site keeps instead of `counts`: no more different numbers than `width` allows, each rounded up to
    `multiple_of`, at most the site's `dense` width. Sites of different dense widths are dealt with apart."""
    most, moved = most_widths(width), dict(counts)
    for size in set(dense.values()) if most else ():
        alike = {site: count for site, count in counts.items() if dense[site] == size}
        moved |= dict(zip(alike, buckets(list(alike.values()), most), strict=True))
    return {site: min(rounded_up(count, multiple_of), dense[site]) for site, count in moved.items()}


def equal_in_groups(counts: Mapping[str, int], group_of: Mapping[str, str], dense: Mapping[str, int]) -> dict[str, int]:
    """The same count for all sites of a group, the experts of one stack: the rounded mean, rounded up to what a grouped
    product of experts takes (EXPERTS), at most the dense width. A site of its own keeps its count."""
    members: dict[str, list[str]] = {}
    for site in counts:
        members.setdefault(group_of[site], []).append(site)
    equal = dict(counts)
    for sites in members.values():
        if len(sites) > 1:
            total = sum(counts[site] for site in sites)
            mean = (2 * total + len(sites)) // (2 * len(sites))
            equal |= {site: min(rounded_up(mean, EXPERTS), dense[site]) for site in sites}
    return equal


def buckets(counts: Sequence[int], most: int) -> list[int]:
    """Every count moved to one of at most `most` widths, so that the squares of the moves add up to the least possible.

    A width is the rounded mean of the counts moved to it, so their total changes by at most half a unit for each.
    Exact: along the sorted counts a bucket is an interval, and the best last bucket leaves a smaller case of the same.
    """
    tally = sorted(Counter(counts).items())
    sums = [list(accumulate((often * value**power for value, often in tally), initial=0)) for power in (0, 1, 2)]

    def bucket(first: int, end: int) -> tuple[int, int]:
        """Width of one bucket of the values first..end-1, and what it costs."""
        number, total, squares = (prefix[end] - prefix[first] for prefix in sums)
        width = (2 * total + number) // (2 * number)  # the mean, halves up
        return width, squares - 2 * width * total + number * width**2

    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}  # values placed -> cost, the width of each
    for _ in range(min(most, len(tally))):
        longer: dict[int, tuple[int, tuple[int, ...]]] = {}
        for end in range(1, len(tally) + 1):
            for first in (first for first in best if first < end):
                width, cost = bucket(first, end)
                cost += best[first][0]
                if end not in longer or cost < longer[end][0]:
                    longer[end] = cost, best[first][1] + (width,) * (end - first)
        best = longer
    moved = dict(zip((value for value, _ in tally), best[len(tally)][1], strict=True))
    return [moved[count] for count in counts]


# ---------------------------------------------------------------- at export


def rounded_up(count: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `count`."""
    return -(-count // multiple) * multiple


def multiple_for(runtime: str | None, tp: int = 1) -> int:
    """What the widths must be a multiple of for `runtime` on `tp` tensor-parallel ranks; 1 without a runtime.

    Raises InputError for an unknown runtime, and for ranks where nothing is split.
    """
    if runtime is not None and runtime not in RUNTIMES:
        raise unknown_name("runtime", runtime, RUNTIMES)
    if type(tp) is not int or tp < 1:
        raise InputError(f"tp must be a whole number of at least 1, got {tp}")
    splitting = [name for name, needs in RUNTIMES.items() if needs.is_split]
    if tp > 1 and runtime not in splitting:
        raise InputError(f"tp {tp} splits the width over ranks, which goes with --for {' and '.join(splitting)} only; "
                         "leave it out.")
    return RUNTIMES[runtime].multiple * tp if runtime else 1


def check_served(runtime: str | None, tp: int, widths: Iterable[int]) -> None:
    """Raises InputError if one of the widths is not what `runtime` needs."""
    multiple = multiple_for(runtime, tp)
    wrong = sorted(width for width in set(widths) if width % multiple)
    if wrong:
        raise InputError(f"{runtime} with tp {tp} needs feed-forward widths that are multiples of {multiple}, and this "
                         f"model can only have {wrong[0]}: select all of its sites with --width uniform --multiple_of "
                         f"{multiple}, or export without --for")


def padding_tax(kept: int, padded: int) -> str:
    """What the zeros cost, in words: bytes of the kept weights, and of the padded ones."""
    return (f"padding adds {padded - kept:,} bytes to the {kept:,} of the kept weights, "
            f"{100 * (padded - kept) / kept:.2f} %")
