"""Where the time of `tied_cross_entropy` goes: CPU seconds of each kind of operation in a step, beside the floor.

    python examples/benchmarks/tied_softmax_profile.py --shapes 1024,768,50257,float32 --json profile.json

One thread, and its CPU time, not the clock: on a machine with other work to do that says what a quiet one would.
A step is the loss of N tokens, width D and V words, and its gradients of hidden states and matrix; the body and the
embedding of `tied_softmax.py` are left out. The floor is that of `tied_softmax.py`: the three products alone, each at
the best rate of any block tried. `own blocks` are the products of the step, at the blocks that it takes. `new memory`
is the time in the kernel, which hands out the pages of gradients and values as they are first written to; the floor
has all its memory before.
"""

import argparse
import json
import resource
import statistics
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from rich.table import Table
from tied_softmax import GOALS, machine, show
from tied_softmax_worker import floor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_tying.losses import tied_cross_entropy

PRODUCTS = ("logits", "hidden states", "matrix")
KINDS = {
    "exponentials": ("exp2_", "exp_", "exp"),
    "reductions": ("sum", "amax", "max", "maximum"),
    "copies and casts": ("copy_", "_to_copy", "clone"),
}


class Seconds(TorchDispatchMode):
    """CPU seconds of the operations that run inside, by their kind."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens, self.width, self.spent = tokens, width, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        start = time.thread_time()
        result = function(*args, **(kwargs or {}))
        self.spent[self.kind_of(function.overloadpacket.__name__, result)] += time.thread_time() - start
        return result

    def kind_of(self, name: str, result) -> str:
        if name in ("mm", "addmm", "addmm_"):
            if result.shape[1] != self.width:
                return "logits"
            return "hidden states" if len(result) == self.tokens else "matrix"
        return next((kind for kind, names in KINDS.items() if name in names), "others")


def profiled(shape: str, options: argparse.Namespace) -> dict:
    """CPU seconds of a step, of its parts and of the floor."""
    n, d, v, dtype = shape.split(",")
    sizes, kind = (int(n), int(d), int(v)), getattr(torch, dtype)
    torch.manual_seed(options.seed)
    labels = torch.randint(sizes[2], sizes[:1])
    hidden = torch.randn(sizes[0], sizes[1]).to(kind).requires_grad_()
    weight = (torch.randn(sizes[2], sizes[1]) * 0.02).to(kind).requires_grad_()
    whole, parts, kernel = [], [], []
    for _ in range(options.steps):
        for found in (whole, parts):  # without the parts too: to look at them takes time
            hidden.grad = weight.grad = None
            start, before = time.thread_time(), in_kernel()
            if found is whole:
                tied_cross_entropy(hidden, weight, labels).backward()
                whole.append(time.thread_time() - start)
                kernel.append(in_kernel() - before)
            else:
                with Seconds(*sizes[:2]) as seconds:
                    tied_cross_entropy(hidden, weight, labels).backward()
                parts.append(seconds.spent)
    with mock.patch.object(time, "perf_counter", time.thread_time):
        alone = floor(*sizes, dtype, "cpu", until=time.monotonic() + options.time_limit)
    names = list(dict.fromkeys(name for each in parts for name in each))
    spent = {name: statistics.median(each[name] for each in parts) for name in names}
    seconds = {"seconds": statistics.median(whole), "in_kernel": statistics.median(kernel)}
    return {"shape": shape, **seconds, "parts": spent, "floor": alone}


def in_kernel() -> float:
    """CPU seconds of this thread in the kernel."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(GOALS), help="N,D,V,dtype")
    parser.add_argument("--steps", type=int, default=3, help="whose median counts")
    parser.add_argument("--seed", type=int, default=0, help="of weights and labels")
    parser.add_argument(
        "--time_limit", type=float, default=120, help="seconds in which blocks are tried for the floor"
    )
    parser.add_argument("--json", help="write all numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = {"machine": machine("cpu"), "rows": []}
    columns = ("shape", "CPU seconds", "to the floor", "own blocks to the floor", "new memory", "parts, of the step")
    table = Table(*columns)
    for shape in options.shapes:
        row = profiled(shape, options)
        report["rows"].append(row)
        whole, alone, parts = row["seconds"], row["floor"]["seconds"], Counter(row["parts"])
        shares = ", ".join(f"{name} {seconds / sum(parts.values()):.0%}" for name, seconds in parts.most_common())
        own = sum(parts[name] for name in PRODUCTS)
        memory = row["in_kernel"] / alone
        table.add_row(shape, f"{whole:.2f}", f"{whole / alone:.2f}", f"{own / alone:.2f}", f"{memory:.2f}", shares)
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show([table], [f"Machine: {report['machine']}"])


if __name__ == "__main__":
    main()
