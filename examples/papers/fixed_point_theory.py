"""Training a deep equilibrium model converges linearly when it is wide (Feng & Kolter 2020; Ling et al. 2023).

    python examples/papers/fixed_point_theory.py --output_dir runs/equilibrium

The network is `f(x) = a . z / sqrt(m)` with the z of `z = relu(c W z / sqrt(m) + U x)`: one tied layer of infinite
depth, of width m. All matrices start as standard normal numbers, and full-batch gradient descent trains them on a few
random points with random labels. The theory says that the loss of a wide network falls by a constant factor in each
step, as long as c keeps the layer a contraction.

A table over widths: the loss at the end, the factor of a step, the share of the log-loss's variance that a straight
line explains (1 means linear convergence), and the most steps that a search for the fixed point took, forward
and backward. With `--output_dir` also `OUT/results.json` and the curves `OUT/equilibrium.png`.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from hf_tying import TyingError
from hf_tying.depth import FixedPoint
from hf_tying.training.command_line import ScriptParser
from hf_tying.training.results_file import write_json


@dataclass
class Arguments:
    widths: str = field(default="16,64,256,1024", metadata={"help": "Widths m, with commas."})
    points: int = field(default=10, metadata={"help": "Training points."})
    inputs: int = field(default=10, metadata={"help": "Numbers in a point."})
    contraction: float = field(default=0.5, metadata={"help": "c. The layer's norm is about 2c in a wide network."})
    steps: int = field(default=200, metadata={"help": "Steps of gradient descent."})
    learning_rate: float = field(default=0.5, metadata={"help": "Of gradient descent."})
    seed: int = field(default=0, metadata={"help": "Of the points and the networks."})
    output_dir: str | None = field(default=None, metadata={"help": "Where results.json and the curves go."})


class Layer(nn.Module):
    """One layer of the network, tied over all depths."""

    def __init__(self, inputs: int, width: int, contraction: float) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(width, width))
        self.outer = nn.Parameter(torch.randn(width, inputs))
        self.scale = contraction / width**0.5

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.scale * z @ self.inner.T + x @ self.outer.T)


def run(arguments: Arguments, width: int) -> dict[str, list[float]]:
    """Losses, and the steps of both searches, of each step of training."""
    torch.manual_seed(arguments.seed)
    x = nn.functional.normalize(torch.randn(arguments.points, arguments.inputs))
    y = torch.randn(arguments.points)
    layer = Layer(arguments.inputs, width, arguments.contraction)
    equilibrium = FixedPoint(layer, tol=1e-6)
    head = nn.Parameter(torch.randn(width))
    optimizer = torch.optim.SGD([*layer.parameters(), head], lr=arguments.learning_rate)
    record: dict[str, list[float]] = {"loss": [], "forward": [], "backward": []}
    for _ in range(arguments.steps):
        z = equilibrium(x, z0=torch.zeros(len(x), width))
        loss = nn.functional.mse_loss(z @ head / width**0.5, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        record["loss"].append(loss.item())
        for side, found in (("forward", equilibrium.solution), ("backward", equilibrium.backward_solution)):
            record[side].append(found.steps if found is not None else math.nan)
    return record


def line_through(losses: list[float]) -> tuple[float, float]:
    """The factor of a step, and the share of the variance of log(loss) that a straight line explains."""
    logs = torch.tensor(losses, dtype=torch.float64).clamp(min=1e-12).log()
    logs = logs[: int((logs > math.log(1e-10)).sum())]  # below that float32 ends, not the theory
    steps = torch.arange(len(logs), dtype=torch.float64)
    slope = ((steps - steps.mean()) * (logs - logs.mean())).sum() / (steps - steps.mean()).square().sum()
    rest = logs - logs.mean() - slope * (steps - steps.mean())
    return math.exp(slope.item()), 1 - (rest.square().sum() / (logs - logs.mean()).square().sum()).item()


def draw(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    """The curves of the loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for width, record in results.items():
        axes.plot(record["loss"], label=f"width {width}")
    axes.set(xlabel="step of gradient descent", ylabel="training loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    (arguments,) = ScriptParser((Arguments,), description=__doc__).parse()
    if arguments.output_dir is not None:
        import matplotlib.figure  # noqa: F401  # missing, it is missed before the work
    results = {width: run(arguments, int(width)) for width in arguments.widths.split(",")}
    table = Table(
        title=f"Gradient descent on {arguments.points} points, {arguments.steps} steps, c = {arguments.contraction}"
    )
    for column in (
        "width",
        "first loss",
        "last loss",
        "factor of a step",
        "explained by a line",
        "steps forward, backward",
    ):
        table.add_column(column)
    for width, record in results.items():
        factor, explained = line_through(record["loss"])
        searches = f"{max(record['forward']):.0f}, {max(record['backward']):.0f}"
        table.add_row(
            width,
            f"{record['loss'][0]:.2g}",
            f"{record['loss'][-1]:.1e}",
            f"{factor:.3f}",
            f"{explained:.3f}",
            searches,
        )
    Console().print(table)
    if arguments.output_dir is not None:
        folder = Path(arguments.output_dir)
        write_json({"contraction": arguments.contraction, "results": results}, folder / "results.json")
        draw(results, folder / "equilibrium.png")


if __name__ == "__main__":
    try:
        main()
    except TyingError as error:
        sys.exit(f"error: {error}")
