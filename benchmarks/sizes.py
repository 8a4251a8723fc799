"""What is measured: the shapes of the models and batches, on a CPU and on a GPU."""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

ANSWER = 5  # labelled positions at the end of an answer-only example


@dataclass(frozen=True)
class Size:
    """One model and its batch. `answer` positions at the end carry a label, all of them if None."""

    name: str
    suffix: str  # of its keys in the JSON file
    architecture: str  # a key of models.ARCHITECTURES
    config: dict[str, object]
    batch: int
    length: int  # tokens; an image model has none
    rows: tuple[str, ...]  # what is measured of it: keys of variants.BUILDERS, or of the passes of measure.selection
    answer: int | None = None
    keep_ratio: float = 0.3
    multiple: int = 1  # the kept width is a multiple of this: 128 on a GPU, where it decides which kernel runs
    seed: int = 0

    @property
    def width(self) -> int:
        return int(self.config["intermediate_size"])

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def kept(self) -> int:
        """Neurons kept of each block."""
        return max(self.multiple, round(self.keep_ratio * self.width / self.multiple) * self.multiple)

    def with_layers(self, layers: int) -> Size:
        return replace(self, config={**self.config, "num_hidden_layers": layers})

    def described(self) -> str:
        """One line for the reader of a table."""
        shape = (f"{self.architecture}, hidden {self.config['hidden_size']}, {self.width} neurons of which {self.kept} "
                 f"are kept, {self.layers} layers")
        vocabulary = f", vocabulary {self.config['vocab_size']}" if "vocab_size" in self.config else ""
        tokens = f" x {self.length} tokens" if self.length else " images"
        answer = f", {self.answer} of {self.length} positions carry a label" if self.answer else ""
        return f"{shape}{vocabulary}; batch {self.batch}{tokens}{answer}"


def _qwen2(hidden: int, neurons: int, layers: int, vocabulary: int, heads: int, kv_heads: int) -> dict[str, object]:
    return {"hidden_size": hidden, "intermediate_size": neurons, "num_hidden_layers": layers,
            "vocab_size": vocabulary, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "tie_word_embeddings": False}


QWEN_SMALL = _qwen2(896, 4864, 4, 8192, 14, 2)
QWEN_05B = _qwen2(896, 4864, 24, 151936, 14, 2)
QWEN_7B = _qwen2(3584, 18944, 28, 152064, 28, 4)
VIT = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6,
       "image_size": 224, "patch_size": 16, "num_labels": 10}
BERT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 12,
        "vocab_size": 30522, "num_labels": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Plan:
    """Everything one run of the benchmark measures."""

    decoders: tuple[Size, ...]  # training on every position, inference
    answers: tuple[Size, ...]  # training on the answer only
    selections: tuple[Size, ...]
    encoders: tuple[Size, ...]
    selection_batches: int
    new_tokens: int
    seconds: dict[str, float]  # by measurement: how long it goes on taking rounds
    is_quick: bool = False  # the ratios only, no tables
    total_seconds: float = math.inf  # after which every measurement takes its fewest rounds
    prompt: int = 32  # tokens before the first decoded one


PAIR = ("narrow", "ours")
ROWS = ("full", "lora", "scatter", "ours", "ours_lora", "narrow", "narrow_trl", "narrow_checkpointed")
ANSWER_ROWS = ("scatter", "ours", "narrow", "narrow_trl")
ENCODER_ROWS = ("full", "scatter", "ours", "narrow")
PASSES = ("forward", "ours", "hooks")


def plan(device: str, quick: bool) -> Plan:
    """Everything, or, if `quick`, ours beside the natively narrow model, at the same sizes."""
    whole = _cuda_plan() if device == "cuda" else _cpu_plan()
    return _quick(whole) if quick else whole


def _quick(whole: Plan) -> Plan:
    decoders = (replace(whole.decoders[0], rows=PAIR),)
    answers = (replace(whole.answers[0], rows=PAIR, batch=whole.answers[0].batch // 2),)
    encoders = tuple(replace(size, rows=PAIR) for size in whole.encoders)
    selections = tuple(replace(size, rows=PASSES[:2]) for size in whole.selections)
    return Plan(decoders, answers, selections, encoders, selection_batches=2, new_tokens=8, is_quick=True,
                total_seconds=165, seconds={"step": 15, "answer": 40, "prefill": 6, "decode": 12, "encoder": 7,
                                            "selection": 12})


def _cpu_plan() -> Plan:
    decoder = Size("decoder", "", "qwen2", QWEN_SMALL, 4, 128, ROWS)
    answer = Size("answer only", "", "qwen2", QWEN_05B, 4, 128, ANSWER_ROWS, ANSWER)
    selections = (Size("selection", "", "qwen2", QWEN_SMALL, 4, 128, PASSES),
                  Size("selection, large vocabulary", "_152k", "qwen2", QWEN_05B, 1, 128, PASSES))
    encoders = (Size("image encoder", "", "vit", VIT, 8, 0, ENCODER_ROWS),
                Size("text encoder", "_bert", "bert", BERT, 8, 128, ENCODER_ROWS))
    return Plan((decoder,), (answer,), selections, encoders, selection_batches=8, new_tokens=16, seconds={
        "step": 90, "answer": 200, "forward": 40, "prefill": 40, "decode": 60, "encoder": 40, "selection": 90})


def _cuda_plan() -> Plan:
    few = ("scatter", "ours", "narrow")  # full fine-tuning of the large one does not fit
    small = Size("0.5B", "", "qwen2", QWEN_05B, 8, 512, ROWS, multiple=128)
    large = Size("7B", "_7b", "qwen2", QWEN_7B, 4, 512, few, multiple=128)
    answers = (replace(small, name="0.5B, answer only", rows=("full", *ANSWER_ROWS), answer=ANSWER),
               replace(large, name="7B, answer only", answer=ANSWER))
    vit = {**VIT, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    encoders = (Size("image encoder", "", "vit", vit, 64, 0, ENCODER_ROWS, multiple=128),
                Size("text encoder", "_bert", "bert", {**BERT, "num_hidden_layers": 12}, 64, 128, ENCODER_ROWS,
                     multiple=128))
    selections = (replace(small, name="selection", suffix="_152k", rows=PASSES),)
    return Plan((small, large), answers, selections, encoders, selection_batches=8, new_tokens=32, total_seconds=480,
                seconds={"step": 30, "answer": 30, "forward": 15, "prefill": 15, "decode": 30, "encoder": 15,
                         "selection": 30})
