"""What log-probabilities over a vocabulary that is split over processes cost: bytes sent, time and memory.

    python examples/benchmarks/split_vocabulary.py --quick
    python examples/benchmarks/split_vocabulary.py --processes 2 --shapes 1024,768,50257,float32 --json split.json

Each process (gloo, on this machine) has N tokens of width D, and its rows of the softmax matrix of V words. A step is
the log-probability and the entropy of each token, and the backward pass to hidden states and matrix. `logits` gathers
the logits of all words, as tensor parallelism does; `matrix` gathers the matrix, and calls `tied_log_probs`; `split`
is `tied_log_probs` of a DTensor, which exchanges a few numbers a token.

In each round every method takes a step, in another order; a ratio to `logits` is that of one round, and printed are
medians over the rounds of process 0. Bytes are those that a process sends in a ring: an all-gather sends what it has
to each other process, an all-reduce twice the part of the others. A first step, not timed, gives them, the peak of
memory above what there was before, and the largest differences of the loss and of the gradient of this process's rows
from those of `logits`, relative to the largest value.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from rich.table import Table
from tied_softmax import machine, show
from tied_softmax_worker import memory_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hf_tying.losses import tied_log_probs
from hf_tying.parallel.collectives import ring

SHAPES = ("1024,768,50257,float32", "1024,768,50257,bfloat16")
ENTROPY_BONUS = 0.01


class Gathered(torch.autograd.Function):
    """The parts of all processes along `dim`; the gradient is that of the own part, the same loss being everywhere."""

    @staticmethod
    def forward(ctx, own: torch.Tensor, dim: int, words: int) -> torch.Tensor:
        size = dist.get_world_size()
        ctx.dim, ctx.own, each = dim, own.shape[dim], -(-words // size)
        if missing := each - own.shape[dim]:  # gloo gathers equal parts
            own = torch.cat([own, own.new_zeros(*(missing if i == dim else n for i, n in enumerate(own.shape)))], dim)
        every = [torch.empty_like(own) for _ in range(size)]
        dist.all_gather(every, own.contiguous())
        ctx.start = each * dist.get_rank()
        return torch.cat(every, dim).narrow(dim, 0, words)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        return upstream.narrow(ctx.dim, ctx.start, ctx.own), None, None


class SummedGradient(torch.autograd.Function):
    """The hidden states themselves; their gradient is summed over the processes."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> torch.Tensor:
        upstream = upstream.contiguous()
        dist.all_reduce(upstream)
        return upstream


class Problem:
    """Tokens that all processes have, and the rows of the matrix that this one has."""

    def __init__(self, n: int, d: int, v: int, dtype: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.words, self.labels = v, torch.randint(v, (n,), generator=generator)
        self.hidden = torch.randn(n, d, generator=generator).to(getattr(torch, dtype)).requires_grad_()
        weight = (torch.randn(v, d, generator=generator) / d**0.5).to(self.hidden.dtype)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.split = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        self.own = self.split.to_local().detach().clone().requires_grad_()

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        logits = Gathered.apply(SummedGradient.apply(self.hidden) @ self.own.T, 1, self.words).float()
        log_probs = logits.log_softmax(-1)
        return log_probs.gather(-1, self.labels[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)

    def matrix(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight = Gathered.apply(self.own, 0, self.words)
        found = tied_log_probs(self.hidden, weight, self.labels, outputs=("log_probs", "entropy"))
        return found.log_probs, found.entropy

    def split_vocabulary(self) -> tuple[torch.Tensor, torch.Tensor]:
        found = tied_log_probs(self.hidden, self.split, self.labels, outputs=("log_probs", "entropy"))
        return found.log_probs, found.entropy

    def forget(self) -> None:
        self.hidden.grad = self.own.grad = self.split.grad = None

    def step(self, method: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        self.forget()
        log_probs, entropy = method()
        loss = -(log_probs + ENTROPY_BONUS * entropy).mean()
        loss.backward()
        return loss.detach()

    @property
    def gradient(self) -> torch.Tensor:
        """Of the rows of this process."""
        return self.own.grad if self.split.grad is None else self.split.grad.to_local()


def counting(sent: list[int]):
    """Context manager: `sent` gets what this process sends for each collective."""
    ranks = dist.get_world_size()
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(every, own, **kwargs):
        sent.append(ring("all_gather", "tp", ranks, own.nbytes * ranks, "").sent)
        return gather(every, own, **kwargs)

    def all_reduce(own, **kwargs):
        sent.append(ring("all_reduce", "tp", ranks, own.nbytes, "").sent)
        return reduce(own, **kwargs)

    return mock.patch.multiple(dist, all_gather=all_gather, all_reduce=all_reduce)


def compare(shape: str, options: argparse.Namespace) -> list[dict]:
    """One row for each method."""
    n, d, v, dtype = shape.split(",")
    problem = Problem(int(n), int(d), int(v), dtype, options.seed)
    methods = {"logits": problem.logits, "matrix": problem.matrix, "split": problem.split_vocabulary}
    rows, results = {}, {}
    for name, method in methods.items():
        sent: list[int] = []
        problem.forget()  # not freed inside of what is measured
        with counting(sent), memory_of("cpu", None) as memory:
            value = problem.step(method)
        results[name] = value, problem.gradient.clone()
        rows[name] = {"shape": shape, "method": name, "seconds": [], "sent": sum(sent), **memory}
    for turn in range(options.rounds):
        order = list(methods)[turn % len(methods) :] + list(methods)[: turn % len(methods)]
        for name in order:
            dist.barrier()
            start = time.perf_counter()
            problem.step(methods[name])
            rows[name]["seconds"].append(time.perf_counter() - start)
    for name, row in rows.items():
        pairs = zip(row["seconds"], rows["logits"]["seconds"], strict=True)
        row["ratio"] = statistics.median(own / base for own, base in pairs)
        row["peak_ratio"] = row["peak_bytes"] / rows["logits"]["peak_bytes"]
        row["differences"] = [
            float((x - y).abs().max() / y.abs().max()) for x, y in zip(results[name], results["logits"], strict=True)
        ]
    return list(rows.values())


def work(rank: int, store: str, options: argparse.Namespace) -> None:
    """One process; the first one prints."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.processes))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.processes)
    report = {"machine": machine("cpu"), "processes": options.processes, "rows": []}
    table = Table("shape", "method", "sent by each", "seconds", "to logits", "peak", "to logits", "differences")
    for shape in options.shapes:
        for row in compare(shape, options):
            report["rows"].append(row)
            table.add_row(
                shape, row["method"], f"{row['sent'] / 2**20:.3f} MiB", f"{statistics.median(row['seconds']):.3f}",
                f"{row['ratio']:.2f}", f"{row['peak_bytes'] / 2**20:.0f} MiB", f"{row['peak_ratio']:.3f}",
                ", ".join(f"{each:.0e}" for each in row["differences"]),
            )  # fmt: skip
        if options.json and rank == 0:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if rank == 0:
        show([table], [f"{options.processes} processes. Machine: {report['machine']}"])
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="N,D,V,dtype")
    parser.add_argument("--processes", type=int, default=2, help="that have a part of the matrix each")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each method")
    parser.add_argument("--seed", type=int, default=0, help="of weights and labels")
    parser.add_argument("--quick", action="store_true", help="one step at a small shape")
    parser.add_argument("--json", help="write all numbers to this file")
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.rounds = ("192,64,4001,float32",), 1
    with tempfile.TemporaryDirectory() as folder:
        if options.processes == 1:
            work(0, f"{folder}/store", options)
        else:
            torch.multiprocessing.spawn(work, (f"{folder}/store", options), nprocs=options.processes)


if __name__ == "__main__":
    main()
