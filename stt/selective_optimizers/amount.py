"""A budget of weights: what a user writes, and sharing it out exactly."""
from __future__ import annotations

from collections.abc import Sequence

from stt.errors import InputError

Amount = int | float | str


def weights_in(amount: Amount, total: int) -> int:
    """How many of `total` weights: 320000 and "320000" are a number; 0.002, "2e-3" and "0.2%" a share (rounded, at
    least one). Raises InputError for anything else, and for more than there are."""
    number = _number(amount)
    count = number if isinstance(number, int) else max(1, round(number * total))
    if count > total:
        raise InputError(f"budget must be at most the {total:,} weights to choose from, got {count:,}")
    return count


def check_amount(amount: Amount) -> None:
    """Raises InputError for what is neither a number of weights nor a share of them, of whatever model."""
    _number(amount)


def _number(amount: Amount) -> int | float:
    """A count of 1 or more, or a share in (0, 1]."""
    if isinstance(amount, bool) or not isinstance(amount, int | float | str):
        raise _wrong(amount)
    try:
        if isinstance(amount, str):
            text = amount.removesuffix("%")
            number = float(text) / 100 if text != amount else float(text) if set(text) & set(".eE") else int(text)
        else:
            number = amount
    except ValueError:
        raise _wrong(amount) from None
    if not (number >= 1 if isinstance(number, int) else 0 < number <= 1):
        raise _wrong(amount)
    return number


def _wrong(amount: Amount) -> InputError:
    return InputError(f"budget must be a number of weights (320000) or a share of them (0.2% or 0.002), got {amount!r}")


def apportioned(total: int, sizes: Sequence[int]) -> list[int]:
    """`total`, at most their sum, shared out in proportion to `sizes`, exactly, none more than its size: whole shares,
    and one more for the largest remainders (of equal ones the first)."""
    whole = max(sum(sizes), 1)
    shares = [total * size // whole for size in sizes]
    remainders = [total * size % whole for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: -remainders[i])
    for i in order[:total - sum(shares)]:
        shares[i] += 1
    return shares
