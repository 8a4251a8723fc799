"""Inputs made up for a model, or for a part of one: enough to see which projection feeds which."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

UNFIT = (AttributeError, TypeError, ValueError, RuntimeError, LookupError, AssertionError, ArithmeticError,
         OSError)  # how a model refuses a batch
TOKENS = 6  # enough positions to tell a layer that mixes them from one that does not


def dummy_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Batches of two that the model may take as its main input: token ids, pictures, spectrograms or waveforms; of an
    encoder-decoder for both sides. The likeliest first; none for any other kind of input."""
    accepted = inspect.signature(model.forward).parameters
    if model.main_input_name not in accepted:
        yield from _queries(model)
        return
    made = {"input_ids": _ids, "pixel_values": _pictures, "input_features": _spectrograms, "input_values": _sounds}
    for main in made.get(model.main_input_name, lambda _: ())(model):
        inputs = {model.main_input_name: main}
        if model.config.is_encoder_decoder and "decoder_input_ids" in accepted:
            inputs["decoder_input_ids"] = next(_ids(model))
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        yield inputs


def fitting_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """The first made-up batch that the model takes, if there is one. Some take one example only (a sequence classifier
    whose config names no padding token), so a batch is also tried with its first example alone."""
    made = list(dummy_inputs(model))
    for inputs in (*made, *map(_first_example, made)):
        try:
            with torch.no_grad():
                model(**inputs)
        except UNFIT:
            continue
        return inputs
    return None


def _first_example(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _queries(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """For a model that is given hidden states (2, TOKENS, hidden) first, as a Q-Former is its queries: these, and those
    of an encoder if it attends to one."""
    first, *others = inspect.signature(model.forward).parameters
    size = getattr(model.config, "hidden_size", None)
    if size:
        of_encoder = getattr(model.config, "encoder_hidden_size", size)
        yield {first: _random(2, TOKENS, size),
               **{name: _random(2, TOKENS, of_encoder) for name in others if name == "encoder_hidden_states"}}


def _ids(model: nn.Module) -> Iterator[Tensor]:
    """(2, TOKENS), each row ending in EOS; or as many rows for each as there are codebooks."""
    text = model.config.get_text_config()
    vocabulary, eos = getattr(text, "vocab_size", None) or 2**16, getattr(text, "eos_token_id", None)
    ids = torch.arange(2 * TOKENS).view(2, TOKENS) % max(vocabulary - 4, 1) + 3
    if isinstance(eos, int) and 0 <= eos < vocabulary:
        ids[:, -1] = eos
    yield ids
    if getattr(text, "num_codebooks", None):
        yield ids.repeat_interleave(text.num_codebooks, dim=0)


def _pictures(model: nn.Module) -> Iterator[Tensor]:
    """(2, C, H, W): as large as the config says, or as pictures usually are."""
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    configs = (model.config, getattr(model.config, "vision_config", None))
    for size in (*(getattr(config, "image_size", None) for config in configs), 64, 224):
        if size:
            yield _random(2, channels, *(size if isinstance(size, list | tuple) else (size, size)))


def _spectrograms(model: nn.Module) -> Iterator[Tensor]:
    """(2, bins, frames) or (2, frames, bins): as many bins as the first layer reads or the config says."""
    layers = (m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Linear))
    first = [next((m.in_channels if isinstance(m, nn.Conv1d) else m.in_features for m in layers), 80)]
    stated = [getattr(model.config, name, None) for name in ("num_mel_bins", "feature_size", "input_dim")]
    positions, longest = (getattr(model.config, name, None) for name in ("max_source_positions", "max_length"))
    for bins in dict.fromkeys(size for size in (*stated, *first) if size):
        for frames in (2 * positions if positions else longest or 64, 64):
            yield _random(2, bins, frames)
            yield _random(2, frames, bins)


def _sounds(model: nn.Module) -> Iterator[Tensor]:
    """(2, samples) or, of one channel, (2, 1, samples); or a spectrogram."""
    for shape in ((2, 4000), (2, 1, 4000)):
        yield _random(*shape)
    yield from _spectrograms(model)


@contextmanager
def passing_over(module: nn.Module, returned: Callable[[Tensor], object] | None) -> Iterator[None]:
    """Children that hold layers of their own return `returned` of the first tensor they are given, for a while."""
    children = [child for child in module.children() if any(isinstance(m, nn.Linear) for m in child.modules())
                and not isinstance(child, nn.Linear | nn.ModuleList | nn.ModuleDict)] if returned else []

    def passed(*args: object, **kwargs: object) -> object:
        return returned(next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None))

    before = [child.__dict__.get("forward") for child in children]
    for child in children:
        child.forward = passed
    try:
        yield
    finally:
        for child, own in zip(children, before, strict=True):
            del child.forward
            child.__dict__.update({"forward": own} if own else {})


def _random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def hidden_inputs(module: nn.Module) -> Iterator[dict[str, object]]:
    """Hidden states that the module may read, of each size its weights have: positions first, then pictures. Other
    arguments it insists on are None."""
    required = [name for name, parameter in inspect.signature(module.forward).parameters.items()
                if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    if not required:
        return
    first, *rest = required
    sizes = [size for p in module.parameters() if p.ndim > 1 for size in p.shape if size > 1]
    for shape in ((2, TOKENS, -1), (2 * TOKENS, -1), (2, -1, 4, 4), (2, -1, TOKENS)):
        for size in sorted(set(sizes), key=lambda size: (-sizes.count(size), size))[:4]:
            yield {first: _random(*(size if n == -1 else n for n in shape)), **dict.fromkeys(rest)}
