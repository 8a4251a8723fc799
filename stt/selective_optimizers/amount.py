"""A budget of weights: what a user writes, and sharing it out exactly."""
from __future__ import annotations

import math
from collections.abc import Sequence

from stt.errors import InputError

Amount = int | float | str


def weights_in(amount: Amount, total: int) -> int:
    """How many of `total` weights: 320000 and "320000" are a number, 0.002 and "0.2%" a share (rounded, at least one).
    Raises InputError for anything else, and for more than there are."""
    share = _share(amount)
    count = max(1, round(share * total)) if share is not None else _whole(amount)
    if count > total:
        raise InputError(f"budget must be at most the {total:,} weights to choose from, got {count:,}")
    return count


def _share(amount: Amount) -> float | None:
    """The share that `amount` says, None if it says a number of weights."""
    if isinstance(amount, str) and amount.endswith("%"):
        try:
            share = float(amount[:-1]) / 100
        except ValueError:
            raise _wrong(amount) from None
    elif isinstance(amount, float) and not amount.is_integer() or (isinstance(amount, str) and "." in amount):
        try:
            share = float(amount)
        except ValueError:
            raise _wrong(amount) from None
    else:
        return None
    if not (math.isfinite(share) and 0 < share <= 1):
        raise _wrong(amount)
    return share


def _whole(amount: Amount) -> int:
    try:
        count = int(amount)
    except (TypeError, ValueError):
        raise _wrong(amount) from None
    if isinstance(amount, bool) or count < 1:
        raise _wrong(amount)
    return count


def _wrong(amount: Amount) -> InputError:
    return InputError(f"budget must be a number of weights (320000) or a share of them (0.2% or 0.002), got {amount!r}")


def apportioned(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` shared out in proportion to `sizes`, exactly, none more than its size: whole shares, and one more for the
    largest remainders (of equal ones the first)."""
    whole = sum(sizes)
    shares = [total * size // whole for size in sizes]
    remainders = [total * size % whole for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: -remainders[i])
    for i in order[:total - sum(shares)]:
        shares[i] += 1
    return shares
