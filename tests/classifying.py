"""For tests of classifiers: tiny models of many kinds on disk, data in every layout, and runs that take seconds."""
from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
import transformers
from PIL import Image
from tiny import ENCODER, GQA, VIT, randomised
from tiny_text import build_tokenizer
from transformers import PreTrainedModel, ViTImageProcessorPil

import train_classifier
from stt import cli
from stt.classifier_arguments import ClassifierArgs

SENTENCES = ("the sea is salt water", "ice is cold", "a fire is warm", "snow", "her brother met a nephew",
             "is the moon warm", "no answer", "yes yes no")
KINDS = {  # model class, config
    "bert": ("BertForSequenceClassification", ENCODER | {"num_labels": 5}),  # a head for other classes
    "bert-base": ("BertModel", ENCODER),
    "roberta": ("RobertaForMaskedLM", ENCODER | {"pad_token_id": 1}),
    "distilbert": ("DistilBertModel", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 44}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 44, "n_positions": 64,
                                 "bos_token_id": 1, "eos_token_id": 1}),
    "qwen2": ("Qwen2ForCausalLM", GQA | {"pad_token_id": None}),
    "vit": ("ViTForImageClassification", VIT),
    "dinov2": ("Dinov2Model", VIT),
    "clip": ("CLIPModel", {"vision_config": VIT, "text_config": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40, "vocab_size": 50,
        "bos_token_id": 1, "eos_token_id": 2}}),
    "clip-vision": ("CLIPVisionModel", VIT),
    "siglip-vision": ("SiglipVisionModel", VIT),
}
OF_IMAGES = ("vit", "dinov2", "clip", "clip-vision", "siglip-vision")


def build(kind: str, folder: Path) -> Path:
    """A tiny model of the kind, with its tokenizer or processor, in folder/kind."""
    name, config = KINDS[kind]
    model_class = getattr(transformers, name)
    tokenizer = build_tokenizer()
    size = {} if kind in OF_IMAGES else {"vocab_size": len(tokenizer) + 8}  # AutoTokenizer adds one for Qwen2
    torch.manual_seed(0)
    model: PreTrainedModel = randomised(model_class(model_class.config_class(**config | size)))
    model.save_pretrained(folder / kind)
    if kind in OF_IMAGES:
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / kind)
    else:
        tokenizer.save_pretrained(folder / kind)
    return folder / kind


def write_table(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    """The rows as .csv, .tsv, .jsonl or .json, as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jsonl", ".json"):
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
        return path
    table = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
    if path.suffix == ".tsv":
        path.write_text("".join("\t".join(cells) + "\n" for cells in table))
        return path
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(table)
    return path


def write_picture(path: Path, shade: int, noise: int = 0) -> Path:
    """An 8 x 8 picture of about one shade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = numpy.random.default_rng(noise).integers(0, 40, (8, 8, 3)) + shade
    Image.fromarray(pixels.astype(numpy.uint8)).save(path)
    return path


def write_pictures(folder: Path, counts: dict[str, int], names: Sequence[str] = ("dark", "grey", "light")) -> Path:
    """folder/SPLIT/CLASS/number.png: as many of every class as `counts` says of each split."""
    for split, count in counts.items():
        for place, name in enumerate(names):
            for number in range(count):
                write_picture(folder / split / name / f"{number}.png", 70 * place, number + 100 * place)
    return folder


def small_texts(folder: Path) -> list[str]:
    """Flags of a text run of seconds: pairs of sentences that do or do not begin alike."""
    rows = [{"text_a": a, "text_b": b, "label": "same" if a[:1] == b[:1] else "other"}
            for a in SENTENCES for b in SENTENCES][:60]
    table = write_table(folder / "pairs.csv", rows)
    return ["--train_file", str(table), "--train_batch", "8", "--num_epoch", "2", "--sample_ratio", "0.5",
            "--log_interval", "1", "--lr", "1e-3", "--max_grad_norm", "1"]


def small_pictures(folder: Path) -> list[str]:
    """Flags of a run of seconds on pictures of three shades."""
    write_pictures(folder / "shades", {"train": 8, "validation": 3, "test": 4})
    return ["--train_file", str(folder / "shades" / "train"), "--eval_file", str(folder / "shades" / "test"),
            "--train_batch", "8", "--num_epoch", "2", "--sample_ratio", "0.5", "--log_interval", "1", "--lr", "1e-3",
            "--max_grad_norm", "1"]


def run(flags: Sequence[str], folder: Path, *more: str) -> int:
    """The exit code of a run in folder/run."""
    return cli.run(train_classifier.main, ClassifierArgs,
                   [*flags, "--output_dir", str(folder), "--run_name", "run", *more])


def results(folder: Path) -> dict:
    """Its results.json."""
    return json.loads((folder / "run" / "results.json").read_text())
