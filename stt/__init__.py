"""Select-Then-Train: adapt a pretrained transformer by selecting the part that matters and training only that part.

>>> selection = stt.select(model, batches, tokenizer)      # which neurons
>>> stt.apply(model, selection)                            # keep only them
>>> stt.train_only(model)                                  # them and the head

Once it is imported, plain `from_pretrained` loads sliced models too (stt/hub.py).
"""
from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_HOME = {"select": "selecting", "apply": "stt_transformer", "train_only": "surgery", "save": "checkpoint",
         "load": "checkpoint", "restore": "checkpoint", "find_sites": "sites", "Selection": "selection",
         "find_heads": "heads", "select_weights": "selective_optimizers.select", "attach": "selective_optimizers.leaf",
         "detach": "selective_optimizers.leaf", "selected_parameters": "selective_optimizers.leaf",
         "Patch": "selective_optimizers.patch", "patch_of": "selective_optimizers.leaf",
         "STTTracker": "stt_tracker", "STTTransformer": "stt_transformer", "STTLinear": "mlps.stt_linear",
         "STTLoraLinear": "stt_lora", "chunked_loss": "loss", "InputError": "errors"}
_QUANTIZERS = "transformers.quantizers.auto"  # where from_pretrained looks up how a checkpoint is loaded

__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import on first use: `import stt` and `stt --help` stay fast."""
    if name not in _HOME:
        raise AttributeError(f"module 'stt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"stt.{_HOME[name]}"), name)


class _WithTransformers(MetaPathFinder):
    """Registers sliced checkpoints with transformers (stt.hub) as soon as transformers is imported, by whomever:
    importing it takes seconds, which `import stt` does not spend."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module("stt.hub")

        spec.loader.exec_module = execute_and_register
        return spec


if _QUANTIZERS in sys.modules:
    importlib.import_module("stt.hub")
else:
    sys.meta_path.insert(0, _WithTransformers())
