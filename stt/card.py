"""The model card of a sliced model: the README.md beside its weights, which the hub shows."""
from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from stt.words import decimal, markdown_table, model_name, percent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stt.selection import Selection

CARD = "README.md"
TAGS = ["select-then-train", "pruned"]
SAID = ("units", "method", "topk_ratio", "keep_ratio", "width", "multiple_of", "threshold", "select_on", "compensate",
        "head_score", "heads_keep", "seed")

INTRODUCTION = """\
# {title}

A {kind} without {removed}, made from {base} by
Select-Then-Train. Every block has its own width.
"""
LOADING = """\
## Load it

```python
import stt  # the package select-then-train
from transformers import {auto}

model = {auto}.from_pretrained("{name}")
```

`import stt` comes before `from_pretrained`: it teaches transformers the widths. Without it, transformers warns of an
unknown quantization type `stt` (nothing here is quantized) and stops, because the weights are narrower than config.json
says. Do not pass `ignore_mismatched_sizes=True` then: the narrow blocks would be random.

To load it without the package, make a plain copy once, {copy}:

```
stt export FOLDER --to {to} --out PLAIN
```
"""
WORDS = {"neurons": "feed-forward neurons", "heads": "attention heads"}
COPIES = {"hf": "padded with exact zeros to one width",
          "dense": "the trained units put back into the dense model, because a plain one has no place for fewer heads"}


def write_card(model: PreTrainedModel, folder: Path) -> None:
    """Write README.md into the folder, unless there is one."""
    if not (folder / CARD).exists():
        (folder / CARD).write_text(card(model, _results(model, folder)), encoding="utf-8")


def card(model: PreTrainedModel, results: Mapping[str, object] | None = None) -> str:
    """The card of a sliced model, as Markdown with YAML front matter. `results` is what the results.json of a run
    holds."""
    selection, base = model.stt_selection, model.config.stt["base"]
    kinds = {WORDS[units]: _kept(selection, units) for units in WORDS}
    introduction = INTRODUCTION.format(
        title=f"{model_name(base)}, sliced" if base else f"A sliced {type(model).__name__}", kind=type(model).__name__,
        removed=" and ".join(_removed(words, sites) for words, sites in kinds.items() if sites),
        base=model_name(base) if base else "an unnamed model")
    tables = [_sites_table(words, sites) for words, sites in kinds.items() if sites]
    parts = [_front_matter(model, base), introduction, _selection_table(model), *tables]
    parts += [_results_table(results)] if results else []
    auto = "AutoModelForCausalLM" if type(model).__name__.endswith("ForCausalLM") else type(model).__name__
    to = "dense" if selection.heads.keys() & selection.keys() else "hf"
    return "\n".join([*parts, LOADING.format(auto=auto, name="FOLDER_OR_HUB_ID", copy=COPIES[to], to=to)])


def _kept(selection: Selection, units: str) -> list[tuple[int, int]]:
    """(kept units, width) of all blocks that hold these units; nothing if none of them is selected, and one that is not
    is whole."""
    names = [site for site in selection.widths if (site in selection.heads) == (units == "heads")]
    return [(len(selection[site]) if site in selection else selection.widths[site], selection.widths[site])
            for site in names] if selection.keys() & set(names) else []


def _removed(words: str, sites: list[tuple[int, int]]) -> str:
    kept, units = (sum(numbers) for numbers in zip(*sites, strict=True))
    return f"{percent(1 - kept / units)} of its {words} ({kept:,} of {units:,} are kept)"


def _front_matter(model: PreTrainedModel, base: str | None) -> str:
    tags = list(dict.fromkeys([*TAGS, *(model.model_tags or ())]))
    data = ModelCardData(library_name="transformers", tags=tags, base_model=base if _is_hub_id(base) else None)
    return f"---\n{data.to_yaml()}\n---\n"


def _is_hub_id(base: str | None) -> bool:
    """A folder is none: nobody else has it."""
    try:
        validate_repo_id(base or "")
    except HFValidationError:
        return False
    return not Path(base).exists()


def _selection_table(model: PreTrainedModel) -> str:
    """How the selection was made, as far as it says."""
    meta = model.stt_selection.meta
    calibration = meta.get("calibration", {})
    rows = [(name.replace("_", " "), meta[name]) for name in SAID if meta.get(name) is not None]
    rows += [(f"calibration {name}", calibration[name]) for name in ("examples", "tokens", "digest")
             if name in calibration]
    rows += [(name, version) for name, version in meta.get("versions", {}).items()]
    if not rows:
        return "## Selection\n\nThe selection does not say how it was made.\n"
    return _section("Selection", [("", ""), *((name, f"`{value}`") for name, value in rows)])


def _sites_table(words: str, sites: list[tuple[int, int]]) -> str:
    """Kept units of the blocks, together for all blocks of one dense width."""
    kept: dict[int, list[int]] = {}
    for count, width in sites:
        kept.setdefault(width, []).append(count)
    rows = [(str(width), str(len(counts)), str(min(counts)), f"{statistics.median(counts):g}", str(max(counts)),
             percent(statistics.mean(counts) / width)) for width, counts in kept.items()]
    head = ("dense width", "blocks", "fewest kept", "median", "most kept", "share kept")
    return _section(f"Kept {words}", [head, *rows]) + "\nconfig.json names every block and its width under `stt`.\n"


def _results_table(results: Mapping[str, object]) -> str:
    accuracy, perplexity = results.get("accuracy", {}), results.get("perplexity", {})
    rows = [("task", f"{results.get('task', '–')}"), ("mode", f"{results.get('mode', '–')}"),
            *((f"accuracy, {name}", percent(accuracy[name])) for name in ("test", "validation", "majority")
              if accuracy.get(name) is not None),
            *((name.replace("_", " "), decimal(value)) for name, value in results.get("metrics", {}).items()
              if name != "accuracy"),
            *((f"perplexity, {name}", decimal(value)) for name, value in perplexity.items())]
    return _section("Results of the run", [("", ""), *rows]) + \
        "\nMeasured when the run ended: what was trained later is not in them.\n"


def _section(title: str, rows: list[tuple[str, ...]]) -> str:
    return "\n".join([f"## {title}", "", *markdown_table(rows), ""])


def _results(model: PreTrainedModel, folder: Path) -> dict[str, object] | None:
    """The results of the run that `folder`, or the sliced checkpoint the model was loaded from, is a part of; None if
    unknown."""
    origin = model.config.name_or_path
    was_loaded = origin and origin != model.config.stt["base"]
    for place in (folder, Path(origin)) if was_loaded else (folder,):
        path = place.absolute().parent / "results.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                return None
            return found if isinstance(found, dict) else None
    return None
