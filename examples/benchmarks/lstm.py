"""How fast the LSTM language model trains: by `Trainer`, stock and with the tied softmax, beside a bare PyTorch loop.

    python examples/benchmarks/lstm.py --quick                     # a few updates, to see it run
    python examples/benchmarks/lstm.py --json lstm.json
    python examples/benchmarks/lstm.py --size zaremba_medium --untied --rounds 5

All three do the same work on the same random words: the model of the size's name (2 x 200, 10,000 words), batch and
steps of its recipe, loss summed over the steps, clipping, SGD, the state carried on. `bare` is `torch.nn.LSTM`,
`F.embedding`, `F.linear`, `F.cross_entropy` and an in-place update in a loop; `trainer` is `CarriedStateTrainer`;
`trainer, tied softmax` is that after `use_tied_loss`. In each round they take turns, each round in another order; a
ratio is that to `bare` of the same round, printed are medians. The times are of whole updates, reading the batch and
logging included; making models and trainers is not.
"""

import json
import platform
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from transformers import HfArgumentParser
from transformers.utils import logging

from hf_tying import use_tied_loss
from hf_tying.data.words import ContiguousText
from hf_tying.models import TiedLSTMConfig, TiedLSTMForCausalLM
from hf_tying.training.carried_state import CarriedStateArguments, CarriedStateTrainer
from hf_tying.training.command_line import HelpFormatter
from hf_tying.training.recipes import RECIPES

METHODS = ("bare", "trainer", "trainer, tied softmax")


@dataclass
class Arguments:
    size: str = field(default="zaremba_small", metadata={"help": "Without dropout, whatever the size."})
    untied: bool = field(default=False, metadata={"help": "Two matrices of 10,000 words."})
    vocabulary: int = field(default=10_000, metadata={"help": "Words."})
    updates: int = field(default=60, metadata={"help": "Of each method in each round."})
    rounds: int = field(default=5, metadata={"help": "In each, all methods in turn."})
    quick: bool = field(default=False, metadata={"help": "One round of 8 updates."})
    seed: int = field(default=0, metadata={"help": "Of words and weights."})
    json: str | None = field(default=None, metadata={"help": "Write all numbers to this file."})


def bare_loop(model: TiedLSTMForCausalLM, text: ContiguousText, clip: float) -> float:
    """Seconds of one pass over the text, on a copy of the model's weights."""
    config = model.config
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    embedding, bias = parameters["lstm.embed_tokens.weight"], parameters["lm_head.bias"]
    output = parameters.get("lm_head.weight", embedding)
    lstm = nn.LSTM(config.embedding_size, config.layer_widths[0], len(config.layer_widths), batch_first=True)
    with torch.no_grad():
        for i, layer in enumerate(model.lstm.layers):
            for name in ("weight_ih", "weight_hh", "bias_ih"):
                getattr(lstm, f"{name}_l{i}").copy_(getattr(layer, f"{name}_l0"))
            getattr(lstm, f"bias_hh_l{i}").zero_().requires_grad_(False)
    trained = [p for name, p in parameters.items() if "lstm.layers" not in name]
    trained += [p for p in lstm.parameters() if p.requires_grad]
    optimizer, state = torch.optim.SGD(trained, lr=1.0), None
    start = time.perf_counter()
    for piece in range(text.pieces):
        words = text.columns[:, piece * text.time_steps : (piece + 1) * text.time_steps + 1]
        hidden, state = lstm(F.embedding(words[:, :-1], embedding), state)
        state = tuple(part.detach() for part in state)
        logits = F.linear(hidden, output, bias).flatten(0, 1)
        loss = F.cross_entropy(logits, words[:, 1:].reshape(-1), reduction="sum") / text.batch_size
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
    return time.perf_counter() - start


def by_trainer(model: TiedLSTMForCausalLM, text: ContiguousText, clip: float, folder: str) -> float:
    args = CarriedStateArguments(
        folder,
        num_train_epochs=1,
        per_device_train_batch_size=text.batch_size,
        max_grad_norm=clip,
        save_strategy="no",
        logging_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = CarriedStateTrainer(model, args, train_dataset=text)
    trainer.train()
    return next(log["epoch_seconds"] for log in trainer.state.log_history if "epoch_seconds" in log)


def main():
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    (arguments,) = parser.parse_args_into_dataclasses()
    if arguments.quick:
        arguments.rounds, arguments.updates = 1, 8
    logging.set_verbosity_error()
    torch.manual_seed(arguments.seed)
    recipe = RECIPES[arguments.size]
    batch, steps, clip = (recipe[name] for name in ("per_device_train_batch_size", "time_steps", "max_grad_norm"))
    rates = ("input_dropout", "hidden_dropout", "output_dropout", "embedding_dropout", "weight_dropout")
    model = TiedLSTMForCausalLM(
        TiedLSTMConfig.named(
            arguments.size,
            vocab_size=arguments.vocabulary,
            tie_word_embeddings=not arguments.untied,
            shared_recurrent_mask=False,
            **dict.fromkeys(rates, 0.0),
        )
    )
    words = torch.randint(0, arguments.vocabulary, (batch * (steps * arguments.updates + 1),))
    text = ContiguousText(words, batch, steps)
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def seconds(method: str, folder: str) -> float:
        model.load_state_dict(weights)
        if method == "bare":
            return bare_loop(model, text, clip)
        use_tied_loss(model, enabled="tied" in method)
        return by_trainer(model, text, clip, folder)

    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:  # not counted: what is made at first use
            seconds(method, folder)
        for turn in range(arguments.rounds):
            order = METHODS[turn % len(METHODS) :] + METHODS[: turn % len(METHODS)]
            rounds.append({method: seconds(method, folder) for method in order})

    count = text.pieces * steps * batch
    results = {
        method: {
            "words_per_second": median(count / turn[method] for turn in rounds),
            "ratio": median(turn["bare"] / turn[method] for turn in rounds),
            "ratios": [turn["bare"] / turn[method] for turn in rounds],
        }
        for method in METHODS
    }
    tied = "untied" if arguments.untied else "tied"
    table = Table(title=f"{arguments.size}, {tied}, {arguments.vocabulary:,} words, batch {batch} x {steps}")
    for column in ("", "words/s", "of the bare loop", "least", "most"):
        table.add_column(column, justify="right" if column else "left")
    for method, result in results.items():
        cells = [f"{result['ratio']:.3f}", f"{min(result['ratios']):.3f}", f"{max(result['ratios']):.3f}"]
        table.add_row(method, f"{result['words_per_second']:,.0f}", *cells)
    Console().print(table)
    Console().print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    if arguments.json:
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": rounds}
        Path(arguments.json).write_text(json.dumps(facts | {"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
