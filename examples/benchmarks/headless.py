"""What a training step costs without a head: contrastive weight tying (CWT) beside cross entropy.

    python examples/benchmarks/headless.py --quick                 # small models, to see it run
    python examples/benchmarks/headless.py --json headless.json    # the paper's small BERT, and a small GPT-2
    python examples/benchmarks/headless.py --models bert --batch_size 64 --rounds 9

`bert` is that of the ablation of Godey et al. 2023 (4 layers, width 512, 30522 words, 15% of the tokens masked),
`gpt2` a causal model of the same size. A step is forward, backward and AdamW: `stock` as transformers has it, `tied`
after `use_tied_loss(model)` (the same loss by blocks, of the masked places alone), `cwt` after
`use_tied_loss(model, objective=ContrastiveObjective())`. Words are drawn by Zipf's law, about as in text.

In each round every method takes a step on the same batch, in another order; a ratio is that of one round, and printed
are medians over the rounds. The peak of memory is that of forward and backward above what there was before: on a CPU
of what torch allocates, on a GPU of its allocator. The published ratio for this BERT is 2.13.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tied_softmax_worker import memory_of
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from hf_tying import use_tied_loss
from hf_tying.objectives.objective import ContrastiveObjective

METHODS = ("stock", "tied", "cwt")
MASKED_SHARE = 0.15


def make(kind: str, method: str, options: argparse.Namespace):
    """A model in training mode and its optimizer; the same initial values for every method."""
    torch.manual_seed(options.seed)
    if kind == "bert":
        model = BertForMaskedLM(
            BertConfig(
                vocab_size=options.words,
                hidden_size=options.width,
                num_hidden_layers=options.layers,
                num_attention_heads=options.width // 64,
                intermediate_size=4 * options.width,
                max_position_embeddings=options.length,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=options.words,
                n_positions=options.length,
                n_embd=options.width,
                n_layer=options.layers,
                n_head=options.width // 64,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    model.to(options.device).train()
    if method == "tied":
        use_tied_loss(model)
    elif method == "cwt":
        use_tied_loss(model, objective=ContrastiveObjective())
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def batch(kind: str, options: argparse.Namespace, generator: torch.Generator) -> dict[str, torch.Tensor]:
    frequency = 1 / torch.arange(10.0, options.words + 10)
    size = options.batch_size * options.length
    ids = torch.multinomial(frequency, size, replacement=True, generator=generator)
    ids = ids.view(options.batch_size, options.length)
    labels = ids.clone()
    if kind == "bert":
        masked = torch.rand(ids.shape, generator=generator) < MASKED_SHARE
        labels[~masked] = -100
        ids = ids.masked_fill(masked, options.words - 1)
    return {"input_ids": ids.to(options.device), "labels": labels.to(options.device)}


def step(model, optimizer, inputs) -> tuple[float, float]:
    """Seconds of forward and backward, and of the whole step."""
    start = moment(model)
    model(**inputs).loss.backward()
    middle = moment(model)
    optimizer.step()
    optimizer.zero_grad()
    return middle - start, moment(model) - start


def moment(model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(kind: str, options: argparse.Namespace) -> dict:
    generator = torch.Generator().manual_seed(options.seed)
    trained = {method: make(kind, method, options) for method in METHODS}
    peaks, inputs = {}, batch(kind, options, generator)
    for method, (model, optimizer) in trained.items():
        step(model, optimizer, inputs)  # makes the optimizer's state
        with memory_of(options.device, None) as memory:
            model(**inputs).loss.backward()
        optimizer.zero_grad()
        peaks[method] = memory["peak_bytes"]
    seconds = {method: [] for method in METHODS}
    for number in range(options.rounds):
        inputs = batch(kind, options, generator)
        for method in METHODS[number % 3 :] + METHODS[: number % 3]:
            seconds[method].append(step(*trained[method], inputs))
    return {
        method: {
            "seconds": statistics.median(whole for _, whole in seconds[method]),
            "forward_backward_seconds": statistics.median(part for part, _ in seconds[method]),
            "speed_of_cwt": ratio(seconds[method], seconds["cwt"], 1),
            "speed_of_cwt_forward_backward": ratio(seconds[method], seconds["cwt"], 0),
            "peak_bytes": peaks[method],
        }
        for method in METHODS
    }


def ratio(times: list, of_cwt: list, which: int) -> float:
    return statistics.median(a[which] / b[which] for a, b in zip(times, of_cwt, strict=True))


def show(results: dict, options: argparse.Namespace) -> None:
    table = Table(
        title=f"{options.layers} x {options.width}, {options.words} words, batch {options.batch_size} x "
        f"{options.length}, {options.rounds} rounds, {options.device}"
    )
    for column in ("", "", "step", "cwt is faster by", "without AdamW", "peak"):
        table.add_column(column, justify="right" if column else "left")
    for kind, methods in results.items():
        for method, row in methods.items():
            table.add_row(
                kind,
                method,
                f"{row['seconds']:.3f} s",
                f"{row['speed_of_cwt']:.2f}",
                f"{row['speed_of_cwt_forward_backward']:.2f}",
                f"{row['peak_bytes'] / 2**20:.0f} MiB",
            )
    Console().print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models and batches, two rounds")
    parser.add_argument("--models", nargs="+", choices=["bert", "gpt2"], default=["bert", "gpt2"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--words", type=int, default=30522)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.width, options.words = 1, 64, 5000
        options.batch_size, options.length, options.rounds = 4, 32, 2
    results = {kind: measure(kind, options) for kind in options.models}
    show(results, options)
    if options.json:
        figures = {"options": {**vars(options), "json": str(options.json)}, "torch": torch.__version__, **results}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
