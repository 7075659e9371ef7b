"""Layers shared over depth, on words: which order of blocks, and which start from a trained model.

    python examples/papers/shared_depth.py --data_dir DIR --output_dir runs/depth

`DIR` has `train.txt` and `valid.txt`. A small Llama is trained from scratch with 4 layers, with 4 blocks over 8 layers
in each order of Takase & Kiyono 2021 ("Lessons on Parameter Sharing"), and with 8 layers. Those with 4 blocks have
equal parameters, those with 8 layers equal compute. Then the trained model of 8 layers is shared by each way to start
of Bae et al. 2024 ("Relaxed Recursive Transformers", section 3), and all are trained on for the same few steps.

The published orders: vanilla 26.57, then sequence 27.13, cycle_rev 27.08, cycle 27.04 BLEU (Takase & Kiyono, WMT
English-German); SVD better than average better than random (Bae et al.). A model of this size shows orders at best.

A table over the seeds; with `--output_dir` also `OUT/results.json` and the picture `OUT/shared_depth.png`. It keeps
no checkpoints: a run that was stopped begins again.
"""

import copy
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_tying import TyingError, assert_tied, share_layers
from hf_tying.data import train_byte_level_bpe
from hf_tying.training.command_line import ScriptParser
from hf_tying.training.results_file import write_json

ORDERS = ("sequence", "cycle", "cycle_rev")
STARTS: dict[str, dict[str, Any]] = {
    "random": {},
    "first": {"init": "first"},
    "average": {"init": "average"},
    "stepwise": {"init": "stepwise"},
    "svd": {"init": "svd", "relax": {"rank": 16}},
}


@dataclass
class Arguments:
    data_dir: str = field(metadata={"help": "Folder with train.txt and valid.txt."})
    steps: int = field(default=400, metadata={"help": "Optimizer steps from scratch."})
    uptraining: int = field(default=60, metadata={"help": "Steps from the trained model."})
    seeds: int = field(default=3, metadata={"help": "Runs of each kind; at least 2, for the deviation."})
    width: int = field(default=96, metadata={"help": "Hidden size."})
    vocabulary: int = field(default=2000, metadata={"help": "Words of the tokenizer."})
    characters: int = field(default=2_000_000, metadata={"help": "Characters of train.txt to use."})
    batch: int = field(default=16, metadata={"help": "Sequences in a step."})
    length: int = field(default=64, metadata={"help": "Words in a sequence."})
    learning_rate: float = field(default=2e-3, metadata={"help": "AdamW's, with a linear decay to 0."})
    output_dir: str | None = field(default=None, metadata={"help": "Where results.json and the picture go."})


class Words:
    """Training batches and the validation text, as ids."""

    def __init__(self, arguments: Arguments) -> None:
        folder = Path(arguments.data_dir)
        texts = [(folder / f"{part}.txt").read_text(encoding="utf-8") for part in ("train", "valid")]
        train = texts[0][: arguments.characters]
        tokenizer = train_byte_level_bpe(train.splitlines(), vocab_size=arguments.vocabulary)
        self.train, valid = (
            torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (train, texts[1][:200_000])
        )
        self.length, self.batch = arguments.length, arguments.batch
        self.valid = valid[: len(valid) // self.length * self.length].reshape(-1, self.length)[:200]
        self.size = len(tokenizer)

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """A batch of sequences, (batch, length)."""
        starts = torch.randint(len(self.train) - self.length, (self.batch,), generator=generator)
        return torch.stack([self.train[start : start + self.length] for start in starts])


def new_model(arguments: Arguments, words: Words, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    width = arguments.width
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words.size, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=arguments.length,
            tie_word_embeddings=True, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def train(model: PreTrainedModel, words: Words, steps: int, rate: float, seed: int, name: str) -> dict[str, float]:
    """Train, and measure the loss on the validation text."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    model.train()
    for _ in track(range(steps), description=name, transient=True):
        ids = words.draw(generator)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert_tied(model)
    model.eval()
    with torch.no_grad():
        losses = [model(batch, labels=batch).loss.item() for batch in words.valid.split(50)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"loss": mean(losses), "parameters": parameters, "seconds": time.perf_counter() - start}


def draw(results: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    """Both parts as bars, with the deviation over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, (title, runs) in zip(figure.subplots(1, 2), results.items(), strict=True):
        losses = [[each["loss"] for each in kind] for kind in runs.values()]
        spread = [stdev(each) if len(each) > 1 else 0.0 for each in losses]
        axes.barh(list(runs), [mean(each) for each in losses], xerr=spread, capsize=3)
        lowest, highest = min(map(min, losses)), max(map(max, losses))
        axes.set(title=title, xlabel="validation loss (nats a word)")
        axes.set_xlim(lowest - (highest - lowest) / 2, highest + (highest - lowest) / 5)
        axes.invert_yaxis()
    figure.savefig(path, dpi=150)


def main() -> None:
    (arguments,) = ScriptParser((Arguments,), description=__doc__).parse()
    if arguments.output_dir is not None:
        import matplotlib.figure  # noqa: F401  # missing, it is missed before the work
    words = Words(arguments)
    scratch: dict[str, list[dict[str, float]]] = {}
    uptrained: dict[str, list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        for name in ("4 layers", *(f"4 x 2, {order}" for order in ORDERS), "8 layers"):
            model = new_model(arguments, words, 4 if name == "4 layers" else 8, seed)
            if "x" in name:
                share_layers(model, name.split(", ")[1], unique=4)
            figures = train(model, words, arguments.steps, arguments.learning_rate, seed, name)
            scratch.setdefault(name, []).append(figures)
        for name, start in STARTS.items():
            shared = new_model(arguments, words, 8, seed + 100) if name == "random" else copy.deepcopy(model)
            if name == "random":  # its layers alone
                kept = {key: value for key, value in model.state_dict().items() if ".layers." not in key}
                shared.load_state_dict(kept, strict=False)
            share_layers(shared, "cycle", unique=4, **start)
            figures = train(shared, words, arguments.uptraining, arguments.learning_rate / 4, seed, name)
            uptrained.setdefault(name, []).append(figures)
    results = {"from scratch": scratch, "from a trained model of 8 layers": uptrained}
    for title, runs in results.items():
        table = Table(title=f"{title}, {arguments.seeds} seeds")
        for column in ("layers", "parameters", "validation loss", "seconds"):
            table.add_column(column)
        for name, each in runs.items():
            losses = [figures["loss"] for figures in each]
            spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
            seconds = mean(figures["seconds"] for figures in each)
            table.add_row(name, f"{each[0]['parameters']:,.0f}", f"{mean(losses):.3f}{spread}", f"{seconds:.0f}")
        Console().print(table)
    if arguments.output_dir is not None:
        folder = Path(arguments.output_dir)
        write_json({"arguments": vars(arguments), "results": results}, folder / "results.json")
        draw(results, folder / "shared_depth.png")


if __name__ == "__main__":
    try:
        main()
    except TyingError as error:
        sys.exit(f"error: {error}")
