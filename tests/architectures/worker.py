"""A process that stays, in which this library cannot be imported: it loads exported folders and runs them."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from stt.errors import InputError

SCRIPT = """
import json, sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "stt":
            raise ImportError("stt is not there")
sys.meta_path.insert(0, Forbid())
import torch, transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
def floats(value):
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [each for one in values for each in floats(one)]
for line in sys.stdin:
    job = json.loads(line)
    model = getattr(transformers, job["class"]).from_pretrained(job["folder"]).eval()
    extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    torch.manual_seed(0)
    with torch.no_grad():
        torch.save(floats(model(**torch.load(job["folder"] + "/inputs.pt"), **extra)), job["folder"] + "/outputs.pt")
    print("done", flush=True)
"""


class Worker:
    """Started when first asked; ended when the block ends."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()

    def run(self, folder: Path, model_class: str, inputs: dict[str, object]) -> list[Tensor]:
        """What the exported model returns. Raises InputError if it does not load or run."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen([sys.executable, "-I", "-c", SCRIPT], text=True, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        torch.save(inputs, folder / "inputs.pt")
        self.process.stdin.write(json.dumps({"folder": str(folder), "class": model_class}) + "\n")
        self.process.stdin.flush()
        if self.process.stdout.readline().strip() != "done":
            raise InputError(f"the exported {model_class} does not load without stt: "
                             f"{self.process.communicate()[1].strip().splitlines()[-1]}")
        return torch.load(folder / "outputs.pt")
