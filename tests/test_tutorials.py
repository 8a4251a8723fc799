"""The three published tutorials: select, transform, freeze, train a step, switch to inference, all outputs kept.

First in our own words with tiny models; then, where the published page lies beside the real data, its own code blocks,
word for word, with the Auto classes returning tiny models.
"""
from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stt.mlps.stt_linear import STTLinear
from stt.stt_tracker import STTTracker
from stt.stt_transformer import STTTransformer

PAGE = "000_select_then_train.md"
TOKENIZER = tiny.tokenizer()


class Images(torch.utils.data.Dataset):
    """What an image data set with a processor's transform gives."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(i)
        return {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": torch.tensor(i % 3)}


class Rows(torch.utils.data.Dataset):
    """Tokenised and padded rows with a label; a slice of it is a list of rows."""

    def __init__(self, per_token: bool):
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for i in range(400):
            length = 2 + i % 5
            mask = (torch.arange(6) < length).long()
            ids = torch.randint(3, tiny.VOCABULARY, (6,), generator=generator) * mask
            labels = torch.where(mask == 1, ids, -100) if per_token else torch.tensor(i % 3)
            self.rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int | slice) -> object:
        return self.rows[i]


def texts(count: int = 400) -> list[str]:
    return [" ".join(f"w{3 + (i * 5 + 7 * j) % 94}" for j in range(2 + i % 5)) for i in range(count)]


def image_rows() -> list[tuple[Tensor, Tensor]]:
    return [(row["pixel_values"], row["labels"]) for row in (Images()[i] for i in range(40))]


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**on_device(model, batch)).logits


def on_device(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published code moves the model to a GPU if there is one."""
    return {name: value.to(model.device) for name, value in batch.items()}


def batch_of(dataset: object, size: int = 4) -> dict[str, Tensor]:
    return next(iter(DataLoader(dataset, batch_size=size)))


# ---------------------------------------------------------------- in our own words


def encoder_inference(name: str, module: STTLinear) -> None:
    """Step 7 of the encoder tutorials: every narrow layer is asked, the down projection too."""
    module.inference_time = True
    module.pad_weights(pad_to=128)


def decoder_inference(name: str, module: STTLinear) -> None:
    """Step 7 of the decoder tutorial: gate and up are asked and padded, the down projection is sent back to scatter."""
    if any(part in name for part in ("gate_proj", "up_proj")):
        module.inference_time = True
        module.pad_weights(pad_to=128)
    elif "down_proj" in name:
        module.inference_time = False


@pytest.mark.parametrize(("name", "dataset", "tokenizer", "heads", "switch"), [
    ("vit", Images(), None, ["classifier", "score"], encoder_inference),
    ("bert", Rows(False), TOKENIZER, ["classifier", "pooler"], encoder_inference),
    ("qwen2", Rows(True), TOKENIZER, ["lm_head"], decoder_inference),
    ("qwen2-tied", Rows(True), TOKENIZER, ["lm_head"], decoder_inference),
], ids=["vit", "bert", "decoder", "tied-decoder"])
def test_the_published_steps(name: str, dataset: torch.utils.data.Dataset, tokenizer: object, heads: list[str],
                             switch: Callable[[str, STTLinear], None]) -> None:
    model, _ = tiny.build(name)
    device = torch.device("cpu")
    dense = sum(p.numel() for p in model.parameters())
    loader = list(DataLoader(dataset, batch_size=32, shuffle=False))[:100]

    tracker = STTTracker(model=model, tokenizer=tokenizer, threshold=0.01, topk_ratio=0.1, verbose=True)
    active = tracker.get_active_indices(dataloader=loader)
    names = tracker.get_layer_name_map()
    transformer = STTTransformer(model=model, active_neurons=active, layer_name_map=names, verbose=True)
    sliced = transformer.transform().to(device)
    narrow = [module for module in sliced.modules() if isinstance(module, STTLinear)]
    assert len(narrow) == 2 * (2 if tokenizer is None or name == "bert" else 3)
    assert sum(p.numel() for p in sliced.parameters()) < dense

    for parameter in sliced.parameters():
        parameter.requires_grad = False
    for key, module in sliced.named_modules():
        if isinstance(module, STTLinear) or any(part in key for part in heads):
            for parameter in module.parameters():
                parameter.requires_grad = True
    expected_to_train = {id(p) for module in narrow for p in module.parameters()}
    assert expected_to_train < {id(p) for p in sliced.parameters() if p.requires_grad}

    batch = batch_of(dataset)
    optimizer = torch.optim.AdamW(sliced.parameters(), lr=1e-2)
    sliced.train()
    losses = []
    for _ in range(5):
        loss = sliced(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    sliced.eval()
    before = outputs(sliced, batch)
    for key, module in sliced.named_modules():
        if isinstance(module, STTLinear):
            switch(key, module)
            torch.testing.assert_close(outputs(sliced, batch), before, rtol=0, atol=1e-5)  # at every moment
    assert all(module.is_compact for module in narrow)
    assert {module.out_features if module.in_indices is None else module.in_features for module in narrow} == {128}


# ---------------------------------------------------------------- word for word


@pytest.fixture
def blocks(data_dir: Path) -> list[str]:
    """The Python blocks of the published page, in its order: ViT, BERT, decoder."""
    page = data_dir.parent / "seeds" / PAGE
    if not page.is_file():
        pytest.skip(f"no {page}: the published tutorials are not here")
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Auto classes return tiny models instead of asking the hub."""
    for auto, name in (("AutoModelForImageClassification", "vit"), ("AutoModelForSequenceClassification", "bert"),
                       ("AutoModelForCausalLM", "qwen2")):
        monkeypatch.setattr(getattr(transformers, auto), "from_pretrained", lambda _, name=name: tiny.build(name)[0])
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: tiny.tokenizer())


TUTORIALS = [
    (0, Images(), batch_of(Images())),
    (0, image_rows(), batch_of(Images())),
    (1, Rows(False), batch_of(Rows(False))),
    (1, texts(), batch_of(Rows(False))),
    (2, Rows(True), batch_of(Rows(True))),
    (2, texts(), batch_of(Rows(True))),
]


@pytest.mark.parametrize(("position", "train_dataset", "batch"), TUTORIALS,
                         ids=["vit-rows", "vit-pairs", "bert-rows", "bert-strings", "decoder-rows", "decoder-strings"])
def test_the_published_code_runs_word_for_word(blocks: list[str], monkeypatch: pytest.MonkeyPatch, position: int,
                                               train_dataset: object, batch: dict[str, Tensor]) -> None:
    """Split at step 7 only to train a step and look at the outputs before it."""
    assert len(blocks) == 3
    stand_ins(monkeypatch)
    before_step_7, mark, step_7 = blocks[position].partition("# 7.")
    assert mark
    names: dict[str, object] = {"train_dataset": train_dataset}
    exec(before_step_7, names)
    model = names["pruned_model"]
    trains = {key for key, p in model.named_parameters() if p.requires_grad}
    narrow = {key for key, module in model.named_modules() if isinstance(module, STTLinear)}
    assert len(narrow) == (6 if position == 2 else 4)
    head = ["classifier.", "bert.pooler.", "lm_head."]
    assert {key.rpartition(".")[0] for key in trains if not key.startswith(tuple(head))} == narrow
    optimizer = names.get("optimizer") or torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    model(**on_device(model, batch)).loss.backward()
    optimizer.step()
    model.eval()
    expected = outputs(model, batch)
    exec(mark + step_7, names)
    torch.testing.assert_close(outputs(model, batch), expected, rtol=0, atol=1e-5)
    assert any(module.is_compact for module in model.modules() if isinstance(module, STTLinear))
