"""Select-Then-Train: adapt a pretrained transformer by selecting the part that matters and training only that part.

>>> selection = stt.select(model, batches, tokenizer)      # which neurons
>>> stt.apply(model, selection)                            # keep only them
>>> stt.train_only(model)                                  # them and the head
"""
from __future__ import annotations

import importlib

_HOME = {"select": "selecting", "apply": "stt_transformer", "train_only": "surgery", "save": "checkpoint",
         "load": "checkpoint", "restore": "checkpoint", "find_sites": "sites", "Selection": "selection",
         "STTTracker": "stt_tracker", "STTTransformer": "stt_transformer", "STTLinear": "mlps.stt_linear",
         "STTLoraLinear": "stt_lora", "chunked_loss": "loss", "InputError": "errors"}

__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import on first use: `import stt` and `stt --help` stay fast."""
    if name not in _HOME:
        raise AttributeError(f"module 'stt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"stt.{_HOME[name]}"), name)
