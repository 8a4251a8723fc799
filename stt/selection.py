"""Selection: the immutable choice of units, site by site, with where it came from. Holds data and set algebra only."""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stt.errors import InputError

FORMAT_VERSION = 1
SELECTION = "selection.safetensors"  # its file in a checkpoint folder
VALUES = "values/"  # before the name of a value in the file
Ids = Tensor | Sequence[int]


class Selection(Mapping[str, Tensor]):
    """Read-only mapping site name -> kept unit ids, sorted, unique, int64.

    `meta` is JSON: method, arguments, widths of the dense sites (site -> F), model fingerprint, versions. `new_values`
    are those of what is kept, by parameter name of the sliced model: a selection with them is a patch. Raises
    InputError for ids that are negative, repeated, not whole numbers, or not below the site's width.
    """

    def __init__(self, units: Mapping[str, Ids], meta: Mapping[str, object] | None = None,
                 new_values: Mapping[str, Tensor] | None = None):
        self.meta: dict[str, object] = {"format_version": FORMAT_VERSION, **(meta or {})}
        self.new_values = dict(new_values or {})
        self._units = {site: _checked(site, ids, self.widths.get(site)) for site, ids in units.items()}

    @property
    def widths(self) -> dict[str, int]:
        return self.meta.get("widths", {})

    @property
    def heads(self) -> dict[str, int]:
        """Query heads of one unit, of every attention site; the units of other sites are neurons."""
        return self.meta.get("heads", {})

    def __getitem__(self, site: str) -> Tensor:
        return self._units[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and _equal(self._units, other._units) \
            and _equal(self.new_values, other.new_values)

    __hash__ = None

    def __repr__(self) -> str:
        kept = sum(len(ids) for ids in self.values())
        return f"Selection({len(self)} sites, {kept} units kept of {sum(self.widths.values()) or 'unknown'})"

    def without_new_values(self) -> Selection:
        """The units and the meta alone."""
        return Selection(self._units, self.meta)

    # ------------------------------------------------------------ set algebra, site by site

    def union(self, other: Mapping[str, Ids]) -> Selection:
        """The units of either."""
        return self._combined(other, lambda a, b: torch.cat([a, b]).unique())

    def intersect(self, other: Mapping[str, Ids]) -> Selection:
        """The units of both."""
        return self._combined(other, lambda a, b: a[torch.isin(a, b)])

    def minus(self, other: Mapping[str, Ids]) -> Selection:
        """The units of this one that are not in the other."""
        return self._combined(other, lambda a, b: a[~torch.isin(a, b)])

    def jaccard(self, other: Mapping[str, Ids]) -> dict[str, float]:
        """|A ∩ B| / |A ∪ B| of each site; 1.0 where both are empty."""
        both, either = self.intersect(other), self.union(other)
        return {site: len(both[site]) / max(len(either[site]), 1) if len(either[site]) else 1.0 for site in self}

    def directed_coverage(self, other: Mapping[str, Ids]) -> dict[str, float]:
        """|A ∩ B| / |B| of each site: the share of `other` that this selection covers; 1.0 where `other` is empty."""
        both = self.intersect(other)
        return {site: len(both[site]) / len(other[site]) if len(other[site]) else 1.0 for site in self}

    def _combined(self, other: Mapping[str, Ids], combine: Callable[[Tensor, Tensor], Tensor]) -> Selection:
        if self.keys() != other.keys():
            raise InputError(f"the selections are of different sites ({_names(self)} against {_names(other)}): "
                             "make both on the same model")
        units = {site: combine(ids, _checked(site, other[site], None)) for site, ids in self.items()}
        return Selection(units, {key: self.meta[key] for key in ("widths", "fingerprint", "heads") if key in self.meta})

    # ------------------------------------------------------------ file

    def save(self, path: str | Path) -> None:
        """One safetensors file: ids in int32 where they fit, values, JSON metadata; written beside and renamed, so
        never half there."""
        path = Path(path)
        temporary = path.with_name(path.name + ".part")
        tensors = {site: _narrowed(ids) for site, ids in self.items()}
        tensors |= {VALUES + name: value.contiguous() for name, value in self.new_values.items()}
        save_file(tensors, temporary, metadata={"stt": json.dumps(self.meta)})
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Raises InputError for a missing, truncated or foreign file, or one from a newer version of the format."""
        if not Path(path).is_file():
            raise InputError(f"no selection file at {path}: give the selection.safetensors of a run")
        try:
            with safe_open(path, "pt") as file:
                meta = (file.metadata() or {}).get("stt")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"{path} is not a readable safetensors file ({error}): "
                             "make the selection again") from error
        meta = _parsed(meta)
        if meta is None:
            raise InputError(f"{path} is a safetensors file but not a selection: "
                             "give the selection.safetensors of a run")
        if meta["format_version"] > FORMAT_VERSION:
            raise InputError(f"{path} has format {meta['format_version']}, this version reads up to {FORMAT_VERSION}: "
                             "update stt")
        values = {name.removeprefix(VALUES): value for name, value in tensors.items() if name.startswith(VALUES)}
        units = {name: value for name, value in tensors.items() if not name.startswith(VALUES)}
        return cls({site: units[site] for site in (*meta.get("widths", ()), *units) if site in units}, meta, values)


def _narrowed(ids: Tensor) -> Tensor:
    """Sorted ids in int32 if they fit."""
    return ids.to(torch.int32 if not len(ids) or ids[-1] < 2 ** 31 else torch.int64).contiguous()


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def _parsed(meta: str | None) -> dict[str, object] | None:
    """The metadata of a selection file; None if it is not one. What a newer version wrote is not looked into."""
    try:
        parsed = json.loads(meta or "")
    except json.JSONDecodeError:
        return None
    if not isinstance(parsed, dict) or type(parsed.get("format_version")) is not int:  # True is an int, too
        return None
    widths = parsed.get("widths", {})
    has_widths = isinstance(widths, dict) and all(type(width) is int for width in widths.values())
    return parsed if has_widths or parsed["format_version"] > FORMAT_VERSION else None


def _checked(site: str, ids: Ids, width: int | None) -> Tensor:
    try:
        tensor = torch.as_tensor(ids).detach().cpu().flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"unit ids of {site} must be whole numbers, got {ids!r:.60}") from error
    if tensor.numel() and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise InputError(f"unit ids of {site} must be whole numbers, got {tensor.dtype}")
    tensor = tensor.long().sort().values
    if tensor.numel() and (tensor[0] < 0 or (width is not None and tensor[-1] >= width)):
        raise InputError(f"unit ids of {site} must be in 0..{'' if width is None else width - 1}, "
                         f"got {tensor[0].item()}..{tensor[-1].item()}")
    if (tensor[1:] == tensor[:-1]).any():
        raise InputError(f"unit ids of {site} repeat: each unit is kept once or not at all")
    return tensor


def _names(sites: Mapping[str, Ids]) -> str:
    return f"{len(sites)} sites from {next(iter(sites), 'none')!r}"
