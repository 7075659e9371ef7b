"""What post-training pays for its tokens: `tied_log_probs` and `tied_distillation` beside whole logits and TRL.

    python examples/benchmarks/post_training.py --quick
    python examples/benchmarks/post_training.py --shapes 1024,768,50257,float32 --json post_training.json

A step is `h = tanh(embedding(ids, W) @ B)`, a loss of its tokens, and its backward pass to W and B, of N tokens, width
D and V words. `log-probs` is the loss of a policy with an entropy bonus: `naive` has whole logits in float32, `trl` is
the function behind TRL's `add_fused_lm_head` (if it is installed), `tied` is `tied_log_probs`, and `tied_float32_head`
the same with `head_dtype=torch.float32`. `distillation` is the KL of a student from a teacher of the same size:
`naive` by whole logits of both, `tied` by `tied_distillation`, `tied_top_k` with the teacher's 64 most likely words
(another loss, so its differences say nothing).

All methods of a problem run in one process. In each round every method takes a step, in another order; a ratio to
`naive` is that of one round, and printed are medians over the rounds. A first step, not timed, gives the peak of
memory above what there was before, on a CPU of what torch allocates, and how many matrices of V x D were alive at
once; and the largest difference of the loss and of the gradient of W from those of `naive`, relative to the largest
value.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table
from tied_softmax import machine, show
from tied_softmax_worker import Layer, memory_of
from torch.nn import functional as F

from hf_tying.losses import tied_distillation, tied_embedding, tied_log_probs

SHAPES = ("1024,768,50257,float32", "1024,768,50257,bfloat16")
ENTROPY_BONUS, TEMPERATURE, WORDS = 0.01, 2.0, 64


def policy_loss(log_probs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    return -(log_probs + ENTROPY_BONUS * entropy).mean()


def naive_log_probs(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    log_probs = F.linear(hidden, weight).float().log_softmax(-1)
    return policy_loss(log_probs.gather(-1, labels[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1))


def trl_log_probs(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from trl.trainer import utils

    chunk, outputs = utils._CHUNKED_LOGPROB_CHUNK_SIZE, ("log_probs", "entropy")
    found = utils._ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, chunk, None, 1.0, outputs)
    return policy_loss(*found[:2])


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, head_dtype=None) -> torch.Tensor:
    tokens = tied_log_probs(hidden, weight, labels, outputs=("log_probs", "entropy"), head_dtype=head_dtype)
    return policy_loss(tokens.log_probs, tokens.entropy)


def float32_head(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return ours(hidden, weight, labels, torch.float32)


def methods_of(problem: str, layer: Layer) -> dict[str, tuple[Callable, Callable]]:
    """Embedding and loss by the method's name."""
    if problem == "log-probs":
        found = {"naive": (F.embedding, naive_log_probs), "tied": (tied_embedding, ours)}
        if layer.weight.dtype != torch.float32:
            found["tied_float32_head"] = (tied_embedding, float32_head)
        try:
            from trl.trainer.utils import _ChunkedLogProbFunction  # noqa: F401
        except ImportError:
            return found
        return found | {"trl": (F.embedding, trl_log_probs)}
    generator = torch.Generator(layer.weight.device).manual_seed(1)
    teacher = torch.randn(layer.weight.shape, generator=generator, device=layer.weight.device) * 0.02
    teacher = teacher.to(layer.weight.dtype)
    seen = torch.randn(len(layer.ids), teacher.shape[1], generator=generator, device=teacher.device).to(teacher.dtype)

    def naive(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_p, log_q = (
            (F.linear(*x).float() / TEMPERATURE).log_softmax(-1) for x in ((seen, teacher), (hidden, weight))
        )
        return TEMPERATURE**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def tied(
        hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, top_k: int | None = None
    ) -> torch.Tensor:
        return tied_distillation(hidden, weight, seen, teacher, TEMPERATURE, top_k=top_k)

    def top_k(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return tied(hidden, weight, labels, WORDS)

    return {
        "naive": (F.embedding, naive), "tied": (tied_embedding, tied), "tied_top_k": (tied_embedding, top_k)
    }  # fmt: skip


def compare(problem: str, shape: str, options: argparse.Namespace, device: str) -> list[dict]:
    """One row for each method."""
    n, d, v, dtype = shape.split(",")
    torch.manual_seed(options.seed)
    layer = Layer(int(n), int(d), int(v), dtype, device)
    methods = methods_of(problem, layer)
    rows, results = {}, {}
    for name, (embed, loss) in methods.items():
        layer.weight.grad = layer.body.grad = None  # not freed inside of what is measured
        with memory_of(device, layer.matrix_bytes) as memory:
            value = layer.step(embed, loss)
        results[name] = value, layer.weight.grad.clone()
        rows[name] = {"problem": problem, "shape": shape, "method": name, "seconds": [], **memory}
    for turn in range(options.rounds):
        order = list(methods)[turn % len(methods) :] + list(methods)[: turn % len(methods)]
        for name in order:
            start = time.perf_counter()
            layer.step(*methods[name])
            if device == "cuda":
                torch.cuda.synchronize()
            rows[name]["seconds"].append(time.perf_counter() - start)
    for name, row in rows.items():
        pairs = zip(row["seconds"], rows["naive"]["seconds"], strict=True)
        row["ratio"] = statistics.median(own / base for own, base in pairs)
        row["peak_ratio"] = row["peak_bytes"] / rows["naive"]["peak_bytes"]
        row["differences"] = [
            float((x - y).abs().max() / y.abs().max()) for x, y in zip(results[name], results["naive"], strict=True)
        ]
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="N,D,V,dtype")
    parser.add_argument("--problems", nargs="+", default=("log-probs", "distillation"), help="log-probs distillation")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each method")
    parser.add_argument("--seed", type=int, default=0, help="of weights, ids and labels")
    parser.add_argument("--use_cpu", action="store_true", help="not the GPU, if there is one")
    parser.add_argument("--quick", action="store_true", help="one step at a small shape")
    parser.add_argument("--json", help="write all numbers to this file")
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.rounds = ("192,64,4000,float32",), 1
    device = "cuda" if torch.cuda.is_available() and not options.use_cpu else "cpu"
    report = {"machine": machine(device), "rows": []}
    table = Table(
        "problem", "shape", "method", "seconds", "to naive", "peak", "to naive", "V x D alive", "differences"
    )
    for shape in options.shapes:
        for problem in options.problems:
            for row in compare(problem, shape, options, device):
                report["rows"].append(row)
                table.add_row(
                    problem, shape, row["method"], f"{statistics.median(row['seconds']):.3f}", f"{row['ratio']:.2f}",
                    f"{row['peak_bytes'] / 2**20:.0f} MiB", f"{row['peak_ratio']:.3f}", str(row.get("matrices", "")),
                    ", ".join(f"{each:.0e}" for each in row["differences"]),
                )  # fmt: skip
            if options.json:
                Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show([table], [f"Machine: {report['machine']}"])


if __name__ == "__main__":
    main()
