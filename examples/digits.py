"""What the examples share: real handwritten digits, turned on their side, and the small ViT that knows them upright."""
from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import AutoModelForImageClassification

from stt.selective_optimizers.load_store import (
    load_summary_from_disk,
    load_weights_from_summary,
    write_summary_to_disk,
)
from stt.selective_optimizers.optimizer import SelectiveOptimizer

MODEL = Path(__file__).resolve().parents[1] / "models" / "vit-digits"
MEAN, STD = 0.3, 0.37  # of the model's image processor
N_TRAIN = 1400


def turned_digits() -> tuple[TensorDataset, TensorDataset]:
    """(pixel_values (N, 3, 8, 8), labels (N,)) to train and to test on, the same split every time."""
    data = load_digits()
    pixels = torch.tensor(numpy.rot90(data.images, axes=(1, 2)).copy() / 16, dtype=torch.float32)
    pixels = ((pixels - MEAN) / STD).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order], torch.tensor(data.target)[order]
    return (TensorDataset(pixels[:N_TRAIN], labels[:N_TRAIN]), TensorDataset(pixels[N_TRAIN:], labels[N_TRAIN:]))


def pretrained_vit(seed: int = 0) -> nn.Module:
    """The model with a new classifier. The same seed draws the same one: a summary holds what training changed, and is
    loaded into the model it began with."""
    torch.manual_seed(seed)
    model = AutoModelForImageClassification.from_pretrained(MODEL)
    nn.init.normal_(model.classifier.weight, std=0.02)
    nn.init.zeros_(model.classifier.bias)
    return model


def vit_with_lora(seed: int = 0) -> nn.Module:
    """The same with low-rank adapters, which train, as its classifier does."""
    model = get_peft_model(pretrained_vit(seed), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "classifier" in name)
    return model


def groups_of(model: nn.Module) -> list[dict[str, object]]:
    """The classifier whole, and everything else that trains to choose from."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [{"params": [parameter for name, parameter in trained if "classifier" in name], "choose_all": True},
            {"params": [parameter for name, parameter in trained if "classifier" not in name]}]


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of right answers."""
    pixels, labels = data.tensors
    return float((model.eval()(pixel_values=pixels).logits.argmax(-1) == labels).float().mean())


def arguments(description: str, argv: list[str] | None, budget: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--method", default="id3", choices=("id3", "pafi", "bitfit"), help="what chooses the weights")
    parser.add_argument("--budget", type=int, default=budget, help="weights to train, the classifier's 650 included")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--summary", type=Path, default=Path("outputs") / "vit-digits-summary.pt",
                        help="where the trained weights are written")
    return parser.parse_args(argv)


def own_arguments(method: str, steps: int) -> dict[str, object]:
    """What only one method takes."""
    return {"id3": {"max_steps": steps, "exp": 0, "eps": 1e-3}}.get(method, {})


def kept_and_loaded(optimizer: SelectiveOptimizer, model: nn.Module, make_base: Callable[[], nn.Module], path: Path,
                    test: TensorDataset) -> float:
    """Write what was trained, put it into the model that training began with, and measure that one."""
    optimizer.post_train_work()
    print(f"weights trained: {optimizer.get_budget_used()}, accuracy {accuracy(model, test):.1%}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_summary_to_disk(path, optimizer.get_summary(model))

    loaded = make_base()
    load_weights_from_summary(loaded, load_summary_from_disk(path))
    print(f"loaded into the base model: accuracy {accuracy(loaded, test):.1%}")
    return accuracy(loaded, test)


def by_name(batch: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch as the model and Trainer take it."""
    pixels, labels = zip(*batch, strict=True)
    return {"pixel_values": torch.stack(pixels), "labels": torch.stack(labels)}
