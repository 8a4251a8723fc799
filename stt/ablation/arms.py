"""The lines of an ablation: what is kept, by what, measured on what, and how it is trained."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stt import scores
from stt.errors import InputError, unknown_name
from stt.modes import IN_PLACE, MODES, Mode

CALIBRATION = "calibration"


@dataclass(frozen=True)
class Arm:
    """One line. None stands for what the flags say. An arm with `own_data` measures its scores on other data or by
    another threshold than the rest, and keeps as many units as STT does on the run's own.

    `is_cut_after`: everything is trained first, then cut, then trained again for an epoch (train, then prune).
    """

    name: str
    mode: Mode
    threshold: float | None = None
    sample_ratio: float | None = None
    from_source: bool = False
    is_cut_after: bool = False
    tune_attn: bool = False
    keep_ratio: float | None = None  # of --keep_ratios
    bias_correction: str | None = None

    @property
    def label(self) -> str:
        """The name, and what share it keeps where there are several."""
        return self.name if self.keep_ratio is None else f"{self.name} {100 * self.keep_ratio:g} %"

    @property
    def cuts(self) -> bool:
        """Whether units are removed."""
        return self.mode.cuts

    @property
    def own_data(self) -> bool:
        """Whether its scores are measured otherwise than those of the other arms."""
        return self.from_source or self.threshold is not None or self.sample_ratio is not None


# The published names that are no mode of training: finetune and baseline are two names of one thing.
ARMS = {
    **{name: Arm(name, mode) for name, mode in (MODES | IN_PLACE).items()},
    "id3_global": Arm("id3_global", IN_PLACE["id3"], bias_correction="global"),
    "finetune": Arm("finetune", MODES["baseline"]),
    "gateprod": Arm("gateprod", Mode("gate_product", "kept")),
    "activation_mean_value": Arm("activation_mean_value", Mode("activation_mean", "kept")),
    "activation_rate": Arm("activation_rate", Mode("activation_rate", "kept")),
    "mag_tp": Arm("mag_tp", Mode("magnitude", "kept"), is_cut_after=True),
    "wanda_tp": Arm("wanda_tp", Mode("wanda", "kept"), is_cut_after=True),
    "stt_attn": Arm("stt_attn", MODES["stt"], tune_attn=True),
}
# The question of this project: does the union of the two best sets beat its halves, and every other choice?
SCORES = ("stt", "activation_mean_value", "activation_rate", "magnitude_pruning", "wanda_adapt", "gateprod", "taylor",
          "random")
GROUPS = ("scores", "ns_activeset", "ns_sigma", "transfer")


def find(names: Sequence[str], thresholds: Sequence[float], sample_ratios: Sequence[float],
         keep_ratios: Sequence[float], tune_attn: bool) -> list[Arm]:
    """The arms of these names, groups taken apart, each once; and each that cuts for every one of `keep_ratios`, if
    there are any. Raises InputError for an unknown name."""
    arms = list(dict.fromkeys(arm for name in names for arm in _named(name, thresholds, sample_ratios)))
    if tune_attn:
        arms = [replace(arm, tune_attn=arm.cuts) for arm in arms]
    return [each for arm in arms for each in ([replace(arm, keep_ratio=ratio) for ratio in keep_ratios]
                                              if arm.mode.chooses_units and keep_ratios else [arm])]


def _named(name: str, thresholds: Sequence[float], sample_ratios: Sequence[float]) -> list[Arm]:
    stt = MODES["stt"]
    if name == "scores":
        return [arm for each in SCORES for arm in _named(each, thresholds, sample_ratios)]
    if name == "ns_sigma":
        return [Arm(f"stt threshold {value:g}", stt, threshold=value) for value in thresholds]
    if name == "ns_activeset":
        return [Arm(f"stt sample {value:g}", stt, sample_ratio=value) for value in sample_ratios]
    if name == "transfer":
        return [ARMS["stt"], Arm("stt of source", stt, from_source=True)]
    if name in ARMS:
        return [ARMS[name]]
    if ":" in name or name in scores.names():
        scores.make(name)  # raises for what cannot be loaded
        return [Arm(name, Mode(name, "kept"))]
    raise unknown_name("mode", name, (*ARMS, *GROUPS, CALIBRATION, *scores.names()))


def reference_of(arm: Arm, arms: Sequence[Arm], name: str) -> Arm:
    """The arm called `name` that keeps the same share, or that keeps everything, or else the first so called."""
    called = [each for each in arms if each.name == name]
    if not called:
        raise InputError(f"reference {name!r} is none of the modes compared ({', '.join(a.name for a in arms)}); give "
                         "one of them.")
    return next((each for each in called if each.keep_ratio == arm.keep_ratio), called[0])
