"""What is known of single types: where the row of a type may say less than that everything was cut, and is exact."""
from __future__ import annotations

from .matrix import EXACT, Row
from .overrides import IDLE, NO_EFFECT, NOT_BUILDABLE, NOT_RUN

WITHOUT = {"bit", "falcon_mamba", "mamba", "mamba2", "regnet", "resnet", "rt_detr_resnet", "textnet",
           "uvdoc_backbone"}  # no feed-forward block
REFUSED = {"bitnet", "convnextv2", "squeezebert"}  # one that cannot be sliced exactly
NO_WIDTH = {"bloom", "convnext", "dinov3_convnext", "flaubert", "hgnet_v2", "lilt", "mobilenet_v1",
            "mobilevitv2", "mpt", "openai-gpt", "pp_lcnet", "pp_lcnet_v3", "pp_lcnet_v4",
            "siglip", "siglip2", "xlm", "xlstm"}  # whose config has no entry that sets it, and nothing else
NOT_RELOADED = {  # nor is the dense model
    "pixio": "transformers 5.23.0 itself loses a layer norm of it when it saves and loads, of the dense model too: it "
             "is saved twice, under names of which one is loaded"}
NO_KNOWN_WIDTH = {  # of convolutions alone: nothing says which of them is a feed-forward block
    "efficientnet", "hgnet_v2", "mobilenet_v1", "mobilenet_v2", "pp_lcnet", "pp_lcnet_v3", "pp_lcnet_v4"}
LOST = {"gemma3n_text": 1, "mobilenet_v1": 1}  # blocks that look like a feed-forward block, and are not sliced
STATED = {  # parameters of feed-forward width that are named as left out
    "fun_asr_nano": 3, "gemma3n_text": 3, "glmasr": 1, "modernvbert": 3, "perceiver": 3, "phi4_multimodal": 3,
    "siglip": 3, "siglip2": 3, "voxtral": 1}
VISIBLE = 1e-4  # what masking a site must change at least


def failures(row: Row) -> list[str]:
    """What is wrong with a row, a sentence each."""
    if row.model_type in NOT_BUILDABLE or row.error:
        return [row.error] if row.error else []
    if not row.blocks:
        return [] if row.model_type in WITHOUT | REFUSED else ["nothing is sliced"]
    return [sentence for is_wrong, sentence in (
        (row.model_type in WITHOUT | REFUSED, "is sliced, and was refused"),
        (row.left_out != LOST.get(row.model_type, 0), f"{row.left_out} blocks are left out"),
        (not row.whole <= row.tolerance, f"with all neurons kept it differs by {row.whole:.1e}"),
        (not row.sliced <= EXACT, f"sliced it differs by {row.sliced:.1e}"),
        (not row.effect > max(VISIBLE, 100 * row.sliced), f"masking a site changes only {row.effect:.1e}"),
        *_without_effect(row), *_uncovered(row), *_unshipped(row)) if is_wrong]


def _without_effect(row: Row) -> list[tuple[bool, str]]:
    stated = tuple(name for table in (IDLE, NOT_RUN, NO_EFFECT) for name in table.get(row.model_type, ()))
    return [(not name.startswith(stated), f"masking {name} changes nothing") for name in row.silent]


def _uncovered(row: Row) -> list[tuple[bool, str]]:
    return [(bool(row.coverage.unstated), f"not sliced and not named: {', '.join(row.coverage.unstated)}"),
            (len(row.coverage.stated) != STATED.get(row.model_type, 0),
             f"named as left out: {', '.join(row.coverage.stated)}"),
            (bool(row.coverage.axes) == (row.model_type in NO_KNOWN_WIDTH),
             f"{row.coverage.axes} axes of a known feed-forward width")]


def _unshipped(row: Row) -> list[tuple[bool, str]]:
    """A type that is not reloaded is not looked at further."""
    is_reloaded = row.reloaded is not None and row.reloaded <= EXACT
    if row.model_type in NOT_RELOADED:
        return [(is_reloaded, "reloads, and was known not to")]
    is_exported = row.exported is not None and row.exported <= EXACT
    return [(not is_reloaded, f"reloaded it differs by {row.reloaded}: {row.reason}"),
            (is_exported == (row.model_type in NO_WIDTH), f"exported it differs by {row.exported}: {row.reason}"),
            (("has no config entry" in row.reason) != (row.model_type in NO_WIDTH), f"why not: {row.reason}")]
