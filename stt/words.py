"""Numbers as a reader wants them: percentages, 1.23 M, 3 min 12 s, and the intervals around them."""
from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from stt.arguments import short_name

Words = Callable[[float | None], str]

Z = 1.959964  # 97.5 % point of the normal distribution
# 97.5 % points of Student's t with 1 .. 30 degrees of freedom; beyond that Z + 2.4 / df is right to 0.003
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
     2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of `correct` in `n`: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).

    Wilson 1927, doi.org/10.2307/2276774
    """
    p = correct / n
    middle, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def student(freedom: int) -> float:
    """The 97.5 % point of Student's t."""
    return T[freedom - 1] if freedom <= len(T) else Z + 2.4 / freedom


def paired_interval(gaps: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of two or more differences: mean ∓ t s / sqrt(n)."""
    half = student(len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return statistics.mean(gaps) - half, statistics.mean(gaps) + half


def percent(share: float | None) -> str:
    """0.1234 -> 12.3 %"""
    return "–" if share is None else f"{100 * share:.1f} %"


def decimal(number: float | None) -> str:
    """0.12345 -> 0.123, 1234.5 -> 1,234"""
    return "–" if number is None else f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def amount(number: float | None) -> str:
    """1234567 -> 1.23 M"""
    if number is None:
        return "–"
    rounded = float(f"{number:.3g}")
    power = min(int(math.log10(rounded) // 3), 6) if rounded >= 1 else 0
    return f"{rounded / 1000**power:.3g} {' kMGTPE'[power]}".strip()


def mebibytes(number: float | None) -> str:
    """1048576 -> 1 MiB"""
    return "–" if number is None else f"{number / 2**20:,.0f} MiB"


def duration(seconds: float | None) -> str:
    """75 -> 1 min 15 s, 7500 -> 2 h 5 min"""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def listed(values: Mapping[str, float], keys: Sequence[str], words: Words) -> str:
    """selection 3 s, training 40 s"""
    return ", ".join(f"{key} {words(values[key])}" for key in keys if key in values) or "–"


def lost(truncation: Mapping[str, Mapping[str, int]]) -> str:
    """train: 3 of 900 prompts cut, 1 answers left out; test: ... Splits that lost nothing are not named."""
    parts = []
    for split, counts in truncation.items():
        of_split = [f"{counts['prompts_cut']} of {counts['examples']} prompts cut"] if counts["prompts_cut"] else []
        of_split += [f"{counts[name]} {name.replace('_', ' ')}" for name in ("answers_left_out", "examples_left_out")
                     if counts[name]]
        parts += [f"{split}: {', '.join(of_split)}"] if of_split else []
    return "; ".join(parts) or "nothing cut or left out"


def arrows(values: Mapping[str, float], keys: Sequence[str], words: Words) -> str:
    """12.1 dense → 13.4 sliced"""
    return " → ".join(f"{words(values[key])} {key}" for key in keys if key in values) or "–"


def mean_of(values: Sequence[float], words: Words) -> str:
    """The mean, in words; – if there are no values."""
    return words(statistics.mean(values)) if values else "–"


def spread(values: Sequence[float], scale: float = 1, unit: str = "", digits: int | None = None) -> str:
    """Mean ± standard deviation; the mean alone of a single value. With `digits` after the point, by default one for
    percentages and two for others."""
    scaled = [scale * value for value in values]
    if not scaled:
        return "–"
    digits = (1 if scale == 100 else 2) if digits is None else digits
    deviation = f" ± {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    return f"{statistics.mean(scaled):.{digits}f}{deviation}{unit}"


def model_name(model: str) -> str:
    """A hub id as it is, a local folder by its last part, a packaged model by its alias."""
    return short_name(model) if Path(model).is_absolute() else model


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; the first row is its head."""
    head, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [f"| {' | '.join(row)} |" for row in body]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines]
