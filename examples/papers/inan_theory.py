"""Inan et al. 2017, validation of the theory: trained by the augmented loss, a softmax matrix goes where L is.

    python examples/papers/inan_theory.py --data_dir DIR --output_dir runs/inan_theory
    python examples/papers/inan_theory.py --data_dir DIR --output_dir runs/quick --betas 0 1 --tokens 2000 --epochs 2

DIR has train.txt: a sentence on a line, words split by spaces. Its first 20,000 words train an untied LSTM of 2 x 300
without dropout, with

    J = beta * J_aug * temperature^2 * |V| + (1 - beta) * J_cross_entropy

for each beta. L is the input embedding, its rows of length 1, and W the softmax matrix, both (V, 300), with no output
bias, which the divergence does not see. The distance of their column spaces is the part of W that no linear map of L's
columns reaches: min over A of ||W - L A|| / ||W|| (Frobenius), about 1 for matrices that know nothing of each other.
The paper's theory says that it falls to 0 as beta goes to 1 with a high temperature. Columns are centred before, since
one number added to all logits of a context changes no loss: W's part along (1, ..., 1) says nothing. `results.json`
has the distance without that too.

What the text does not tell, and what it takes: SGD with momentum, since Adam's rates by element take W out of the span
of its gradients; 5 rows of 35 words, the state carried on; the rate falls to 0 along a cosine; W starts small, since a
start value stays in it where no gradient reaches. The target has no gradient: with one, all rows of L become alike,
which makes the divergence 0 and the question empty (--detach_target False shows it).
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lstm_training import run
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from hf_tying.config import TyingError
from hf_tying.data.words import read_words
from hf_tying.losses.augmented import augmented_parts
from hf_tying.losses.options import AugmentedSettings
from hf_tying.training.command_line import ScriptParser
from hf_tying.training.results_file import write_json

#: About what the paper reports at a temperature of 10.
PUBLISHED = {"temperature": 10, "distances": {"0": 1.0, "1": 0.06}}
ROWS, STEPS = 5, 35


@dataclass
class Arguments:
    data_dir: str = field(metadata={"help": "Folder with train.txt: a sentence on a line, words split by spaces."})
    output_dir: str = field(metadata={"help": "Where results.json and theory.png go."})
    betas: list[float] = field(
        default_factory=lambda: [0.0, 0.5, 1.0], metadata={"help": "Shares of the divergence in the loss, 0 to 1."}
    )
    temperature: float = field(default=10.0, metadata={"help": "Of both softmaxes in the divergence."})
    tokens: int = field(default=20_000, metadata={"help": "Words from the beginning of the text."})
    hidden_size: int = field(default=300, metadata={"help": "Of both layers, and of a word vector."})
    epochs: int = field(default=20, metadata={"help": "Passes over the words."})
    learning_rate: float = field(default=0.03, metadata={"help": "Of SGD with momentum 0.9, at the start."})
    detach_target: bool = field(default=True, metadata={"help": "No gradient through the target distribution."})
    seed: int = field(default=0, metadata={"help": "Of the start values, the same for each beta."})

    def __post_init__(self):
        if not self.betas or not all(0 <= beta <= 1 for beta in self.betas):
            raise TyingError(f"--betas is {self.betas}: expected at least one, each from 0 to 1.")
        for name in ("temperature", "hidden_size", "epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise TyingError(f"--{name} is {getattr(self, name)}: expected a number above 0.")


class UntiedLSTM(nn.Module):
    """A language model whose word vectors have length 1, with a softmax matrix of its own."""

    def __init__(self, vocabulary: int, size: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(vocabulary, size))
        self.lstm = nn.LSTM(size, size, num_layers=2, batch_first=True)
        self.softmax = nn.Parameter(torch.randn(vocabulary, size) * 1e-4)

    @property
    def embedding(self) -> torch.Tensor:
        """L, (V, size)."""
        return F.normalize(self.vectors, dim=1)

    def forward(self, ids, embedding, state):
        return self.lstm(F.embedding(ids, embedding), state)


def subspace_distance(matrix: torch.Tensor, other: torch.Tensor, centred: bool = True) -> float:
    """The relative residual of `matrix` (V, D) projected on the column space of `other` (V, any width), centred."""
    matrix, other = (each.detach().double() for each in (matrix, other))
    if centred:
        matrix, other = matrix - matrix.mean(0), other - other.mean(0)
    basis = torch.linalg.qr(other).Q
    return float((matrix - basis @ (basis.t() @ matrix)).norm() / matrix.norm())


def read_ids(arguments: Arguments) -> torch.Tensor:
    """(tokens,), numbers of the different words among these tokens alone."""
    words = read_words(Path(arguments.data_dir, "train.txt"))[: arguments.tokens]
    if len(words) <= 2 * ROWS or len(set(words)) <= arguments.hidden_size:
        raise TyingError(
            f"{len(words)} words, {len(set(words))} different ones: expected more than {2 * ROWS}, and more different "
            f"ones than --hidden_size {arguments.hidden_size}, or every matrix spans all. Give a longer text, or more "
            "--tokens."
        )
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return torch.tensor([numbers[word] for word in words])


def train(arguments: Arguments, ids: torch.Tensor, beta: float, report) -> dict:
    """One model; its distance and losses by epoch."""
    torch.manual_seed(arguments.seed)
    start, vocabulary = time.time(), int(ids.max()) + 1
    model = UntiedLSTM(vocabulary, arguments.hidden_size)
    length = (len(ids) - 1) // ROWS
    inputs, labels = (ids[shift : shift + ROWS * length].view(ROWS, length) for shift in (0, 1))
    windows = range(0, length, STEPS)
    optimizer = torch.optim.SGD(model.parameters(), arguments.learning_rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs * len(windows))
    settings = AugmentedSettings(
        temperature=arguments.temperature,
        alpha=beta * arguments.temperature**2 * vocabulary,
        detach_target=arguments.detach_target,
        cross_entropy_weight=1 - beta,
    )
    epochs = []
    for epoch in range(arguments.epochs):
        state, losses = None, []
        for begin in windows:
            window = slice(begin, begin + STEPS)
            embedding = model.embedding
            hidden, state = model(inputs[:, window], embedding, state)
            state = tuple(part.detach() for part in state)
            loss, cross_entropy = augmented_parts(
                hidden, model.softmax, labels[:, window], settings, embedding=embedding
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            losses.append((loss.item(), cross_entropy.item()))
        loss, cross_entropy = torch.tensor(losses).mean(0).tolist()
        distance = subspace_distance(model.softmax, model.embedding)
        epochs.append({"epoch": epoch + 1, "distance": distance, "loss": loss, "cross_entropy": cross_entropy})
        epochs[-1]["distance_not_centred"] = subspace_distance(model.softmax, model.embedding, centred=False)
        report(beta, epochs[-1])
    return {"beta": beta, "distance": distance, "seconds": time.time() - start, "epochs": epochs}


def plot(runs: list[dict], temperature: float, path: Path) -> None:
    """The distance over beta, and over the epochs."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    runs = sorted(runs, key=lambda run: run["beta"])
    left.plot([run["beta"] for run in runs], [run["distance"] for run in runs], "o-", label="here")
    if temperature == PUBLISHED["temperature"]:
        published = PUBLISHED["distances"]
        left.plot([float(beta) for beta in published], list(published.values()), "x", label="published, about")
    left.set(xlabel="beta", ylabel="distance of W from the columns of L", title=f"temperature {temperature:g}")
    for run_ in runs:
        right.plot(
            [each["epoch"] for each in run_["epochs"]],
            [each["distance"] for each in run_["epochs"]],
            label=f"beta {run_['beta']:g}",
        )
    right.set(xlabel="epoch", title="while training")
    for axes in (left, right):
        axes.set_ylim(0, 1.05)
        axes.legend()
    figure.savefig(path, dpi=120)


def main():
    (arguments,) = ScriptParser((Arguments,), description=__doc__).parse()
    console, output = Console(soft_wrap=True), Path(arguments.output_dir)
    ids = read_ids(arguments)
    console.print(f"{len(ids):,} words, {int(ids.max()) + 1:,} different ones")

    def report(beta, epoch):
        line = "beta {:g}, epoch {epoch}: distance {distance:.3f}, loss {loss:.4g}, cross entropy {cross_entropy:.3f}"
        console.print(line.format(beta, **epoch))

    runs = [train(arguments, ids, beta, report) for beta in arguments.betas]
    settings = {
        name: getattr(arguments, name)
        for name in ("temperature", "hidden_size", "learning_rate", "detach_target", "seed")
    }
    results = settings | {"tokens": len(ids), "vocabulary": int(ids.max()) + 1, "runs": runs, "published": PUBLISHED}
    write_json(results, output / "results.json")
    plot(runs, arguments.temperature, output / "theory.png")
    console.print(f"Written {output}: results.json, theory.png")


if __name__ == "__main__":
    run(main)
