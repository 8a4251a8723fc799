"""The report of one run, report.md and report.html with figures, and the tables of many (see stt/comparison.py)."""
from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stt import plots
from stt.comparison import HEADS, compare, main_metric, measured, split_name
from stt.runs import load_run
from stt.words import (
    amount,
    arrows,
    decimal,
    duration,
    listed,
    lost,
    markdown_table,
    mebibytes,
    model_name,
    percent,
    wilson,
)

__all__ = ["compare", "load_run", "summary_lines", "write_report"]

MOST_CLASSES = 50  # of a confusion matrix that can be read
CONFUSION = "Rows are the true classes, columns the predicted ones, shares of each row."


@dataclass(frozen=True)
class Section:
    """A part of a report: text, a table whose first row is its head, a figure under the run folder."""

    title: str
    text: str = ""
    rows: Sequence[Sequence[str]] = ()
    figure: str | None = None


# ---------------------------------------------------------------- one run


def write_report(run_dir: str | Path, results: Mapping[str, object] | None = None) -> Path:
    """Writes plots/*.png, report.md and report.html into the run folder; returns the path of report.html.

    `results` is what results.json will hold (default: what it holds).
    """
    folder = Path(run_dir)
    results = load_run(folder).results if results is None else results
    sections = _sections(results, _figures(folder, results))
    title = f"{results['mode']} · {results['task']} · {model_name(results['model'])} · seed {results['seed']}"
    (folder / "report.md").write_text(_markdown(title, sections), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_html(title, sections, folder, results), encoding="utf-8")
    return page


def summary_lines(results: Mapping[str, object]) -> list[str]:
    """The main numbers of a run for the terminal, one per line, aligned."""
    rows = _summary(results)
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def _score_name(results: Mapping[str, object]) -> str:
    """What the main number is called: free text is right only if all of it is."""
    is_free = "main" not in results and results["accuracy"]["majority"] is None
    return f"{split_name(results)} {'exact match' if is_free else main_metric(results).replace('_', ' ')}"


def _summary(results: Mapping[str, object]) -> list[tuple[str, str]]:
    parameters = results["parameters"]
    rows = [*_scores(results)]
    rows += [("parameters", f"{amount(parameters['dense'])} dense, {amount(parameters['kept'])} kept, "
              f"{amount(parameters['trained'])} trained ({amount(parameters['trained_without_head'])} without the "
              f"head; head {HEADS.get(results['head'], results['head'])})")]
    for units, sites in _by_units(results["sites"]).items():
        much = f"{sum(site['kept'] for site in sites):,} trained in {len(sites)} tensors" if units == "weights" else \
            f"{_kept(sites)} {_verb(results)} in {len(sites)} sites"
        rows.append((units, f"{much}, chosen by {results['selected_by']}"))
        rows += _agreement(sites)
    if "perplexity" in results:
        rows.append(("perplexity", arrows(results["perplexity"], ("dense", "sliced", "trained"), decimal)))
    rows.append(("FLOPs", listed(results["flops"], ("selection", "training", "teacher", "inference"), amount)))
    ratio = (results.get("throughput") or {}).get("ratio")
    if ratio:
        rows.append(("speed", f"{_speed_words(ratio)} of the dense model"))
    if results.get("training_tokens_per_second"):
        rows.append(("training speed", f"{amount(results['training_tokens_per_second'])} tokens a second, padding and "
                     "validation aside"))
    if results.get("truncation"):
        counts = dict(results["truncation"])
        rows.append(("max_length", f"{counts.pop('max_length'):,} tokens; {lost(counts)}"))
    rows.append(("time", listed(results["seconds"], ("selection", "training", "evaluation", "total"), duration)))
    rows.append(("peak memory", mebibytes(results.get("peak_memory_bytes"))))
    return rows


def _by_units(sites: Sequence[Mapping[str, object]]) -> dict[str, list[Mapping[str, object]]]:
    """The sites of neurons, those of attention heads and the tensors of weights, of which there are any."""
    kinds = {units: [site for site in sites if site["units"] == units] for units in ("neurons", "heads", "weights")}
    return {units: of_kind for units, of_kind in kinds.items() if of_kind}


def _verb(results: Mapping[str, object]) -> str:
    """What happens to the chosen units."""
    return "trained" if results.get("in_place") else "kept"


def _kept(sites: Sequence[Mapping[str, object]]) -> str:
    """The share kept of the units of these sites."""
    return percent(sum(site["kept"] for site in sites) / sum(site["width"] for site in sites))


def _scores(results: Mapping[str, object]) -> list[tuple[str, str]]:
    """The main number first."""
    accuracy, rows = results["accuracy"], []
    if "main" in results:
        rows += [(f"{split_name(results)} {name.replace('_', ' ')}", f"{decimal(value)} on {accuracy['n']} examples")
                 for name, value in results["metrics"].items() if name != "accuracy"]
    if "test" in accuracy:
        low, high = wilson(accuracy["correct"], accuracy["n"])
        name = f"{split_name(results)} accuracy" if "main" in results else _score_name(results)
        at = len(rows) if main_metric(results) != "accuracy" else 0
        rows.insert(at, (name, f"{percent(accuracy['test'])} ({accuracy['correct']} of {accuracy['n']}; 95 % interval "
                         f"{percent(low)} to {percent(high)}; majority class {percent(accuracy['majority'])})"))
    if results.get("answer_loss") is not None:
        rows.append(("answer loss", f"{decimal(results['answer_loss'])} nats per answer token of the "
                     f"{split_name(results)} data"))
    if accuracy.get("restored") is not None:
        rows.append(("restored", f"{percent(accuracy['restored'])} with the removed units put back"))
    return rows


def _speed_words(ratio: Mapping[str, float]) -> str:
    """Of a decoder or a classifier."""
    if "examples_per_second" in ratio:
        return f"examples a second x {decimal(ratio['examples_per_second'])}"
    return (f"decoding x {decimal(ratio['decode_tokens_per_second'])}, prefill time x "
            f"{decimal(ratio['prefill_seconds'])}")


def _agreement(sites: Sequence[Mapping[str, object]]) -> list[tuple[str, str]]:
    """How far two halves of the data would have kept the same units."""
    known = [site for site in sites if site.get("jaccard") is not None]
    if not known:
        return []
    least = min(known, key=lambda site: site["jaccard"])
    mean = sum(site["jaccard"] for site in known) / len(known)
    return [("agreement", f"Jaccard {decimal(mean)} between the choices of two halves of the data (least: "
             f"{decimal(least['jaccard'])}, {least['name']})")]


def agreement_lines(sites: Sequence[Mapping[str, object]]) -> list[str]:
    """How far each site's choice can be trusted, one line a site."""
    width = max(len(site["name"]) for site in sites)
    return [f"{site['name']:<{width}}  {site['kept']:>6,} of {site['width']:,} kept, Jaccard of two halves "
            f"{decimal(site['jaccard'])}, margin at the cut {decimal(site['margin'])} sd" + _tokens(site)
            for site in sites]


def _tokens(site: Mapping[str, object]) -> str:
    """What an expert was judged on."""
    if "tokens" not in site:
        return ""
    return f", {site['tokens']:,} tokens" + ("" if site["tokens"] >= site["min_tokens"] else ": ranked by magnitude")


def _sections(results: Mapping[str, object], figures: Mapping[str, str]) -> list[Section]:
    sections = [Section("Summary", rows=[("", ""), *_summary(results)])]
    if "training" in figures:
        sections.append(Section("Training", "Faint: every logged step. Bold: smoothed.", figure=figures["training"]))
    for units, sites in _by_units(results["sites"]).items():
        title = f"{_verb(results).capitalize()} {units}"
        sections.append(Section(title, _what_is_shown(units, sites), _site_rows(sites), figures[units]))
    if "composition" in figures:
        sections.append(Section("Composition", "A neuron is kept if its mean pre-activation or its activation rate is "
                                "among the largest of its site.", figure=figures["composition"]))
    if results.get("classes"):
        sections.append(Section("Classes", CONFUSION if "confusion" in figures else "", _class_rows(results["classes"]),
                                figures.get("confusion")))
    if results.get("throughput"):
        sections.append(_speed(results["throughput"]))
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    sections.append(Section("Where it ran", rows=[("", ""), ("device", str(results["device"])),
                                                  ("commit", results["git_commit"] or "outside git"),
                                                  ("versions", packages)]))
    return sections


def _what_is_shown(units: str, sites: Sequence[Mapping[str, object]]) -> str:
    """In words."""
    if units == "weights":
        return "Beside them the head trains, if it does. A tensor without any is left out."
    if units == "neurons":
        return "Pale: the dense model's."
    counts = sorted({site["query_heads_of_unit"] for site in sites})
    return ("Pale: the dense model's. One is a key/value head with the "
            f"{' or '.join(map(str, counts))} query head(s) that read it.")


def _class_rows(classes: Sequence[Mapping[str, object]]) -> list[list[str]]:
    numbers = ("precision", "recall", "f1")
    rows = [[str(each["name"]), *(percent(each[name]) for name in numbers), f"{each['examples']:,}"]
            for each in classes]
    return [["class", "precision", "recall", "F1", "examples"], *rows]


def _site_rows(sites: Sequence[Mapping[str, object]]) -> list[list[str]]:
    if sites[0]["units"] == "weights":
        rows = [[str(site["name"]), f"{site['width']:,}", f"{site['kept']:,}", percent(site["kept"] / site["width"])]
                for site in sites]
        return [["tensor", "weights", "trained", "share"], *rows]
    keys = ["width", "kept", *(key for key, _, _ in plots.COMPOSITION if key in sites[0])]
    rows = [[str(site["name"]), *(f"{site[key]:,}" for key in keys), decimal(site["jaccard"]),
             decimal(site["margin"])] for site in sites]
    return [["site", *(key.replace("_", " ") for key in keys), "Jaccard of halves", "margin at the cut (sd)"], *rows]


def _speed(throughput: Mapping[str, object]) -> Section:
    models = [name for name in ("dense", "sliced", "ratio") if name in throughput]
    rows = [[key.replace("_", " "), *(decimal(throughput[name][key]) for name in models)]
            for key in throughput["dense"]]
    setting = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in throughput.items() if key not in models)
    return Section("Speed", f"Medians ({setting}); the ratio is sliced / dense.", [["", *models], *rows])


def _figures(folder: Path, results: Mapping[str, object]) -> dict[str, str]:
    """Draws what there is data for: name -> path inside the run folder."""
    metrics, sites, drawn = folder / "metrics.jsonl", results["sites"], {}
    if metrics.is_file():
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        plots.training_curve(rows, folder / "plots" / "training.png", results["mode"], _loss_name(results))
        drawn["training"] = "plots/training.png"
    for units, of_kind in _by_units(sites).items():
        drawn[units] = "plots/kept.png" if units == "neurons" else f"plots/kept_{units}.png"
        if units == "weights":
            plots.chosen_weights(of_kind, folder / drawn[units])
        else:
            plots.kept_units(of_kind, folder / drawn[units], units, _verb(results))
    neurons = _by_units(sites).get("neurons", [])
    if neurons and all(key in site for site in neurons for key, _, _ in plots.COMPOSITION):
        plots.composition(neurons, folder / "plots" / "composition.png")
        drawn["composition"] = "plots/composition.png"
    if 1 < len(results.get("classes") or ()) <= MOST_CLASSES:
        names = [str(each["name"]) for each in results["classes"]]
        plots.confusion(results["confusion"], names, folder / "plots" / "confusion.png")
        drawn["confusion"] = "plots/confusion.png"
    return drawn


def _loss_name(results: Mapping[str, object]) -> str:
    """What the training loss is a mean over."""
    return "loss per example" if "main" in results else "loss per answer token"


# ---------------------------------------------------------------- markdown and HTML


def _markdown(title: str, sections: Sequence[Section]) -> str:
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        lines += [section.text, ""] if section.text else []
        lines += [f"![{section.title}]({section.figure})", ""] if section.figure else []
        lines += [*markdown_table(section.rows), ""] if section.rows else []
    return "\n".join(lines)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ margin: 0; background: #f8fafc; color: #1e293b; font: 15px/1.5 system-ui, sans-serif; }}
main {{ max-width: 860px; margin: 32px auto; padding: 0 16px; }}
h1 {{ font-size: 24px; margin: 0 0 16px; }} h2 {{ font-size: 17px; margin: 0 0 8px; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; }}
.cards div, section {{ background: white; border: 1px solid #e2e8f0; border-radius: 10px; padding: 16px 20px; }}
.cards b {{ display: block; font-size: 26px; color: {colour}; }} .cards span, p {{ color: #64748b; }}
section {{ margin-top: 16px; overflow-x: auto; }} p {{ margin: 0 0 8px; }} img {{ width: 100%; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
td, th {{ text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-bottom: 1px solid #eef2f7; }}
th {{ color: #64748b; font-weight: 500; }} tr:last-child td {{ border-bottom: 0; }}
</style></head><body><main><h1>{title}</h1><div class="cards">{cards}</div>{body}</main></body></html>
"""


def _html(title: str, sections: Sequence[Section], folder: Path, results: Mapping[str, object]) -> str:
    parameters = results["parameters"]
    shares = {units: _kept(sites) for units, sites in _by_units(results["sites"]).items()} or {"neurons": percent(1.0)}
    cards = ((_score_name(results), percent(measured(results))),
             ("trained parameters", amount(parameters["trained"])),
             *((f"{units} {_verb(results)}", share) for units, share in shares.items()),
             ("training", duration(results["seconds"]["training"])))
    return PAGE.format(title=html.escape(title), colour=plots.MODE_COLOURS.get(results["mode"], plots.INK),
                       cards="".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in cards),
                       body="".join(_html_section(section, folder) for section in sections))


def _html_section(section: Section, folder: Path) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{html.escape(section.text)}</p>")
    if section.figure:
        image = base64.b64encode((folder / section.figure).read_bytes()).decode()
        parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{image}">')
    if section.rows:
        head, *body = ([html.escape(cell) for cell in row] for row in section.rows)
        lines = [f"<tr><th>{'</th><th>'.join(head)}</th></tr>"] if any(head) else []
        lines += [f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in body]
        parts.append(f"<table>{''.join(lines)}</table>")
    return f"<section>{''.join(parts)}</section>"
