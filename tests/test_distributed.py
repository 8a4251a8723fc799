"""Two processes, each with half of the data, measure what one process measures on all of it."""
from __future__ import annotations

from pathlib import Path

import torch
from tiny_text import build_decoder
from torch import multiprocessing

from stt.selecting import Budget, kept, measure


def measured(batches: list[torch.Tensor]):
    return measure(build_decoder(vocabulary=60), batches, None, ["stt", "wanda"], progress=False)


def worker(rank: int, folder: str, batches: list[torch.Tensor]) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = measured(batches[rank::2])
    torch.save({"scores": found.scores, "selection": dict(kept(found, "stt", Budget(0.3)))}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_statistics_add_up_over_ranks(tmp_path: Path):
    batches = list(torch.randint(3, 60, (5, 2, 9), generator=torch.Generator().manual_seed(0)))
    whole = measured(batches)
    multiprocessing.spawn(worker, (str(tmp_path), batches), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, sites in whole.scores.items():
        for site, score in sites.items():
            assert torch.equal(one["scores"][name][site], other["scores"][name][site])
            torch.testing.assert_close(one["scores"][name][site], score, rtol=1e-6, atol=1e-6)
    expected = kept(whole, "stt", Budget(0.3))
    assert all(torch.equal(one["selection"][site], ids) for site, ids in expected.items())
