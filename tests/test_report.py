"""Reports of made-up runs: every number where it belongs, every comparison that must not be made refused."""
from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import fake_run
import matplotlib.figure
import pytest

from stt import plots, words
from stt.errors import InputError
from stt.llm_arguments import LLMArgs, resolved
from stt.report import agreement_lines, compare, load_run, summary_lines, write_report
from stt.runs import read_json
from stt.words import amount, decimal, duration, paired_interval, percent, spread, wilson


def rows_of(markdown: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of every table row."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1:] for cells in lines}


# ---------------------------------------------------------------- intervals and words


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (1, 10), (7, 10), (10, 10), (281, 450), (3, 1000)])
def test_wilson_solves_its_equation(correct, n):
    """The ends are the p with |correct / n - p| = 1.96 sqrt(p (1 - p) / n), found by bisection."""
    share = correct / n

    def excess(p: float) -> float:
        return abs(share - p) - 1.959964 * math.sqrt(p * (1 - p) / n)

    def bisect(inside: float, outside: float) -> float:
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if excess(middle) < 0 else (inside, middle)
        return inside

    low, high = wilson(correct, n)
    middle = (low + high) / 2
    assert low == pytest.approx(bisect(middle, 0.0) if correct else 0.0, abs=1e-9)
    assert high == pytest.approx(bisect(middle, 1.0) if correct < n else 1.0, abs=1e-9)


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 30, 31, 100])
def test_t_points(freedom):
    """The area under Student's density up to the tabled point is 97.5 %."""
    gaps = [float((-1) ** i) for i in range(freedom + 1)]
    low, high = paired_interval(gaps)
    t = (high - low) / 2 / (statistics.stdev(gaps) / math.sqrt(len(gaps)))
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    steps = 20000
    xs = [t * (i + 0.5) / steps for i in range(steps)]
    area = sum(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in xs) * t / steps
    assert 0.5 + area == pytest.approx(0.975, abs=2e-4)


def test_paired_interval():
    gaps = [0.01, 0.03, 0.02]
    low, high = paired_interval(gaps)
    half = 4.303 * statistics.stdev(gaps) / math.sqrt(3)
    assert (low, high) == pytest.approx((0.02 - half, 0.02 + half), abs=1e-12)


@pytest.mark.parametrize(("write", "value", "expected"), [
    (percent, 0.12345, "12.3 %"), (percent, None, "–"), (decimal, 12.345, "12.3"), (decimal, 1234.5, "1,234"),
    (decimal, 999.6, "1,000"), (decimal, None, "–"), (amount, 0, "0"), (amount, 999, "999"), (amount, 999_999, "1 M"),
    (amount, 1_234_567, "1.23 M"), (amount, 2.5e12, "2.5 T"), (amount, None, "–"),
    (duration, 3.14, "3.1 s"), (duration, 75, "1 min 15 s"), (duration, 7500, "2 h 5 min"),
    (duration, 59.7, "1 min 0 s"), (duration, None, "–"),
    (words.mebibytes, 3 * 2**20, "3 MiB"), (words.model_name, "/a/b/c", "c"),
    (words.model_name, "org/name", "org/name"), (spread, [], "–"), (spread, [2.0], "2.00")])
def test_words(write, value, expected):
    assert write(value) == expected


# ---------------------------------------------------------------- one run


def test_summary_lines():
    text = "\n".join(summary_lines(fake_run.results(correct=210)))
    low, high = wilson(210, 300)
    for expected in ("70.0 % (210 of 300", f"95 % interval {percent(low)} to {percent(high)}", "majority class 7.0 %",
                     "1 M dense, 700 k kept, 300 k trained (236 k without the head; head trained)", "33.8 % kept in 4",
                     "12 dense → 15.5 sliced → 13.2 trained", "selection 3 G, training 2.5 T, inference 50 M",
                     "decoding x 1.5, prefill time x 0.5", "training 1 min 35 s", "512 MiB"):
        assert expected in text
    starts = {len(line) - len(re.sub(r"^.{1,14}?  +", "", line)) for line in summary_lines(fake_run.results())}
    assert len(starts) == 1  # aligned


def test_summary_of_a_mode_that_keeps_everything():
    text = "\n".join(summary_lines(fake_run.results(mode="baseline")))
    assert not [word for word in ("sites", "sliced", "selection", "speed") if word in text]


def test_summary_with_restored_neurons_and_numbers_that_are_missing():
    results = fake_run.results()
    results["accuracy"]["restored"] = 0.61
    results["perplexity"]["sliced"] = None  # was infinite
    del results["throughput"]
    text = "\n".join(summary_lines(results))
    assert "61.0 % with the removed units put back" in text
    assert "12 dense → – sliced → 13.2 trained" in text


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "img":
            self.images.append(given["src"])
        assert tag not in ("script", "link", "iframe")
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_files(tmp_path):
    folder = fake_run.write(tmp_path / "run")
    assert write_report(folder) == folder / "report.html"
    assert sorted(path.name for path in (folder / "plots").iterdir()) == ["composition.png", "kept.png", "training.png"]
    markdown = (folder / "report.md").read_text()
    assert markdown.startswith("# stt · clutrr · stt-tiny · seed 0\n")
    for figure in re.findall(r"!\[.*\]\((.*)\)", markdown):
        assert (folder / figure).is_file()
    rows = rows_of(markdown)
    assert rows["model.layers.2.mlp"] == ["200", "70", "30", "25", "15", "0.78", "0.01"]
    assert rows["decode tokens per second"] == ["100", "150", "1.5"]
    assert rows["versions"] == ["python 3.11.7, torch 2.13.0"]
    page = Reader()
    page.feed((folder / "report.html").read_text())
    assert page.open == []
    assert len(page.images) == 3
    for source, name in zip(page.images, ("training", "kept", "composition"), strict=True):
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == (folder / "plots" / f"{name}.png").read_bytes()
    text = " ".join(page.text)
    assert "70.0 %" in text
    assert "300 k" in text
    assert "model.layers.3.mlp" in text


def test_report_before_results_json_is_written(tmp_path):
    folder = fake_run.write(tmp_path / "run")
    (folder / "results.json").unlink()
    write_report(folder, fake_run.results(mode="baseline"))
    assert not (folder / "results.json").exists()
    assert [path.name for path in (folder / "plots").iterdir()] == ["training.png"]


def test_report_escapes_what_it_is_given(tmp_path):
    folder = fake_run.write(tmp_path / "run")
    write_report(folder, fake_run.results() | {"device": "<script>alert(1)</script>", "task": "a<b"})
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "a&lt;b" in page


def drawn(monkeypatch, draw, *arguments) -> matplotlib.figure.Figure:
    """The figure that `draw` saves, caught before it is closed."""
    caught = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, path, **_: caught.append(self))
    draw(*arguments)
    return caught[0]


def test_kept_figure_shows_the_numbers(monkeypatch, tmp_path):
    sites = fake_run.results(sites=6)["sites"]
    axes = drawn(monkeypatch, plots.kept_units, sites, tmp_path / "kept.png").axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [200] * 6 + [site["kept"] for site in sites]
    assert [label.get_text() for label in axes.get_xticklabels()] == list("012345")
    assert axes.get_title(loc="left") == "Kept neurons: 435 of 1,200 (36.2%)"


def test_composition_figure_adds_up(monkeypatch, tmp_path):
    sites = fake_run.results()["sites"]
    axes = drawn(monkeypatch, plots.composition, sites, tmp_path / "composition.png").axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    stacks = [sum(heights[place::len(sites)]) for place in range(len(sites))]
    assert stacks == pytest.approx([1.0] * len(sites))
    assert heights[0] == pytest.approx(sites[0]["mean_only"] / sites[0]["kept"])


def test_training_figure_shows_every_row(monkeypatch, tmp_path):
    rows = [*fake_run.metrics(), {"step": 620, "loss": None}]  # a loss that was not finite
    figure = drawn(monkeypatch, plots.training_curve, rows, tmp_path / "training.png", "stt")
    faint, bold = figure.axes[0].lines
    assert list(faint.get_ydata()) == [row["loss"] for row in rows if row.get("loss") is not None]
    losses = list(faint.get_ydata())
    assert bold.get_ydata()[30] == pytest.approx(statistics.mean(losses[27:34]))  # 5 % of 60 rows on either side
    assert list(figure.axes[1].lines[0].get_ydata()) == pytest.approx([0.34, 0.48, 0.62])


def test_training_figure_without_rows(tmp_path):
    plots.training_curve([], tmp_path / "training.png", "stt")
    assert (tmp_path / "training.png").is_file()


def test_sites_without_layer_numbers_are_named(monkeypatch, tmp_path):
    sites = [{"name": name, "width": 8, "kept": 4} for name in ("encoder.0.mlp.1", "encoder.0.mlp.2")]
    axes = drawn(monkeypatch, plots.kept_units, sites, tmp_path / "kept.png").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["encoder.0.mlp.1", "encoder.0.mlp.2"]


# ---------------------------------------------------------------- many runs


def test_seeds_of_one_configuration_share_a_row(tmp_path):
    correct = {0: 200, 1: 215, 2: 221}
    runs = [fake_run.write(tmp_path / f"stt{seed}", {"run_name": f"stt{seed}", "log_interval": seed}, seed=seed,
                           correct=count) for seed, count in correct.items()]
    runs += [fake_run.write(tmp_path / "base", mode="baseline", correct=150)]
    rows = rows_of(compare(runs, tmp_path / "comparison.png"))
    shares = [100 * count / 300 for count in correct.values()]
    assert rows["stt"][:2] == ["3", f"{statistics.mean(shares):.1f} ± {statistics.stdev(shares):.1f} %"]
    assert rows["stt"][2:5] == ["300 k", "236 k", "33.8 %"]
    assert rows["stt"][6] == "13.26 ± 0.01"
    assert rows["baseline"][:2] == ["1", "50.0 %"]  # one run has no spread
    assert list(rows).index("baseline") < list(rows).index("stt")
    assert (tmp_path / "comparison.png").is_file()


def test_what_differs_stands_in_the_label(tmp_path):
    runs = [fake_run.write(tmp_path / f"r{ratio}", {"topk_ratio": ratio}, correct=int(300 * ratio))
            for ratio in (0.5, 0.1)]
    runs.append(fake_run.write(tmp_path / "lora", mode="lora"))
    assert [name for name in rows_of(compare(runs)) if name not in ("mode", "---")] == [
        "lora", "stt (topk_ratio 0.1)", "stt (topk_ratio 0.5)"]


def test_every_head_policy_has_its_own_accuracy_column(tmp_path):
    correct = {"train": 240, "freeze": 150, "untie": 180}
    runs = [fake_run.write(tmp_path / f"{head}{mode}", head=head, mode=mode, correct=count)
            for head, count in correct.items() for mode in ("stt", "random")]
    rows = rows_of(compare(runs, tmp_path / "comparison.png"))
    assert rows["mode"][1:4] == ["test accuracy, head trained", "test accuracy, head frozen",
                                 "test accuracy, head untied and trained"]
    assert rows["stt"][:4] == ["1", "80.0 %", "50.0 %", "60.0 %"]
    assert rows["random"][:4] == ["1", "80.0 %", "50.0 %", "60.0 %"]


@pytest.mark.parametrize(("dev_mode", "name", "other"), [
    (False, "test accuracy", "held-out accuracy"), (True, "held-out accuracy", "test accuracy")])
def test_the_accuracy_says_what_it_was_measured_on(tmp_path, dev_mode, name, other):
    run = fake_run.write(tmp_path / "run")
    (run / "results.json").write_text(json.dumps(fake_run.results() | {"dev_mode": dev_mode}))
    write_report(run)
    shown = [compare([run]), "\n".join(summary_lines(load_run(run).results)),
             *((run / page).read_text() for page in ("report.md", "report.html"))]
    assert all(name in text and other not in text for text in shown)
    assert f"<span>{name}</span>" in shown[-1]
    assert rows_of(shown[0])["mode"][1] == f"{name}, head trained"


@pytest.mark.parametrize("change", [{"task": "boolq"}, {"model": "org/other"}, {"dev_mode": True},
                                    {"accuracy": {"test": 0.5, "n": 10, "correct": 5, "majority": 0.1}}])
def test_what_cannot_be_compared_gets_its_own_table(tmp_path, change):
    first, second = fake_run.write(tmp_path / "a"), fake_run.write(tmp_path / "b", mode="random")
    (second / "results.json").write_text(json.dumps(fake_run.results(mode="random") | change))
    assert compare([first, second]).count("### ") == 2


def as_resolved(mode, seed):
    """The arguments that the recipe writes down, but for the run's folder."""
    given = dataclasses.asdict(resolved(LLMArgs(mode=mode, seed=seed)))
    return {name: value for name, value in given.items() if name != "run_name"}


def test_stt_minus_random_is_paired_by_seed(tmp_path):
    ours, theirs = {0: 200, 1: 215, 2: 221}, {1: 190, 2: 212, 3: 100}
    runs = [fake_run.write(tmp_path / f"{mode}{seed}", as_resolved(mode, seed), mode=mode, seed=seed, correct=count)
            for mode, counts in (("stt", ours), ("random", theirs)) for seed, count in counts.items()]
    gaps = [(215 - 190) / 300, (221 - 212) / 300]
    half = 12.706 * statistics.stdev(gaps) / math.sqrt(2)
    mean = statistics.mean(gaps)
    assert (f"stt minus random, head trained, over 2 common seeds: {100 * mean:+.1f} points, "
            f"95 % interval {100 * (mean - half):+.1f} to {100 * (mean + half):+.1f}") in compare(runs)


def test_a_model_is_the_same_wherever_it_lies(tmp_path):
    runs = [fake_run.write(tmp_path / str(seed), {"model": f"/machine{seed}/stt-tiny"}, seed=seed) for seed in (0, 1)]
    assert rows_of(compare(runs))["stt"][0] == "2"


def test_stt_and_random_at_other_budgets_are_not_paired(tmp_path):
    runs = [fake_run.write(tmp_path / f"{mode}{seed}", {"topk_ratio": ratio}, mode=mode, seed=seed)
            for mode, ratio in (("stt", 0.3), ("random", 0.1)) for seed in (0, 1)]
    assert "minus random" not in compare(runs)


def test_runs_that_cannot_be_compared(tmp_path):
    run, twin = fake_run.write(tmp_path / "a"), fake_run.write(tmp_path / "b")
    with pytest.raises(InputError, match="same configuration with the same seed"):
        compare([run, twin])
    with pytest.raises(InputError, match="nothing to compare"):
        compare([])
    with pytest.raises(InputError, match="none is not a run folder"):
        compare([run, tmp_path / "none"])
    (twin / "results.json").unlink()
    with pytest.raises(InputError, match=r"the run in .*/b is not complete"):
        compare([run, twin])


@pytest.mark.parametrize("file", ["args.json", "results.json"])
@pytest.mark.parametrize(("content", "sentence"), [
    (b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[1]", "must hold a JSON object, got a list")])
def test_files_that_cannot_be_read(tmp_path, file, content, sentence):
    run = fake_run.write(tmp_path / "a")
    (run / file).write_bytes(content)
    for read in (lambda: load_run(run), lambda: read_json(run / file)):
        with pytest.raises(InputError, match=sentence) as caught:
            read()
        assert file in str(caught.value)
        assert "\n" not in str(caught.value)


def test_results_of_a_newer_release(tmp_path):
    run = fake_run.write(tmp_path / "a")
    (run / "results.json").write_text('{"format_version": 2}')
    with pytest.raises(InputError, match="has format 2"):
        load_run(run)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*args\.json"):
        read_json(tmp_path / "args.json")


def test_figures_can_be_drawn_for_one_and_for_many_rows(tmp_path):
    for count in (1, 9):
        bars = [plots.Bar(f"row {i}", "stt", (0.5, 0.6), (1.0, 2.0)) for i in range(count)]
        plots.comparison({"a": (bars, 0.1), "b": (bars, 0.2)}, Path(tmp_path) / f"{count}.png")
        assert (tmp_path / f"{count}.png").stat().st_size > 10_000


def test_an_expert_says_how_many_tokens_it_was_judged_on() -> None:
    common = {"name": "e.0", "kept": 8, "width": 20, "jaccard": 0.5, "margin": 0.1, "min_tokens": 32}
    many, few = agreement_lines([{**common, "tokens": 1234}, {**common, "tokens": 31}])
    assert many.endswith("sd, 1,234 tokens")
    assert few.endswith("sd, 31 tokens: ranked by magnitude")
