"""Act3D's pattern (Gervet et al. 2023, section 3): one cross-attention block over three coarse-to-fine stages.

    python examples/papers/act3d_stages.py --output_dir runs/act3d

A made-up task with the paper's shape. A scene has points in a cube, each of a colour. An instruction names the colour
of one of them, and the target lies at a fixed offset from that point. In each stage ghost points are drawn around the
best one so far, in a smaller cube each time. A block scores each ghost point by attention to the scene, with positions
relative to the ghost point in units of the stage's cube.

The blocks of the three stages are one (`tie`) or three that start with the same values, trained for equal steps on the
same scenes. A table of parameters, of the loss on new scenes and of the distance from the target, over the seeds; with
`--output_dir` also `OUT/results.json`, and the last tied network by `save_tied`. It keeps no checkpoints: a run that
was stopped begins again.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from hf_tying import TyingError, assert_tied, save_tied, tie
from hf_tying.training.command_line import ScriptParser
from hf_tying.training.results_file import write_json

COLOURS, POINTS, GHOSTS = 6, 6, 48
#: Half of the side of the cube in which a stage draws its ghost points.
REACH = (1.0, 0.4, 0.16)
OFFSET = torch.tensor([0.1, -0.05, 0.15])


@dataclass
class Arguments:
    steps: int = field(default=300, metadata={"help": "Optimizer steps of each network."})
    seeds: int = field(default=3, metadata={"help": "Networks of each kind; at least 2, for the deviation."})
    batch: int = field(default=32, metadata={"help": "Scenes in a step."})
    width: int = field(default=32, metadata={"help": "Features of a point."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Adam's."})
    output_dir: str | None = field(default=None, metadata={"help": "Where results.json and the tied network go."})


@dataclass
class Scenes:
    """A batch: `points` (batch, POINTS, 3), `colours` (batch, POINTS, COLOURS), `wanted` (batch, COLOURS), target."""

    points: torch.Tensor
    colours: torch.Tensor
    wanted: torch.Tensor
    target: torch.Tensor


def draw_scenes(count: int, generator: torch.Generator) -> Scenes:
    """Scenes in which each point has another colour, so that the instruction names one point."""
    points = torch.rand(count, POINTS, 3, generator=generator) * 1.4 - 0.7
    order = torch.rand(count, COLOURS, generator=generator).argsort(-1)[:, :POINTS]
    colours = nn.functional.one_hot(order, COLOURS).float()
    chosen = torch.randint(POINTS, (count,), generator=generator)
    rows = torch.arange(count)
    return Scenes(points, colours, colours[rows, chosen], points[rows, chosen] + OFFSET)


class CrossAttention(nn.Module):
    """Score ghost points by attention to the points of a scene."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(COLOURS, width)
        self.key = nn.Linear(COLOURS, width)
        self.value = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width))
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, ghosts: torch.Tensor, scenes: Scenes, reach: float) -> torch.Tensor:
        """Scores (batch, ghosts) of `ghosts` (batch, ghosts, 3)."""
        apart = scenes.points[:, None] - ghosts[:, :, None]
        place = torch.cat([apart / reach, torch.full_like(apart[..., :1], reach)], dim=-1)
        matches = self.key(scenes.colours) @ self.query(scenes.wanted)[:, :, None]
        attention = (matches.squeeze(-1) / self.key.out_features**0.5).softmax(-1)
        return self.score((attention[:, None, :, None] * self.value(place)).sum(2)).squeeze(-1)


class Stages(nn.Module):
    """Three blocks, from coarse to fine."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(CrossAttention(width) for _ in REACH)
        for stage in self.stages[1:]:
            stage.load_state_dict(self.stages[0].state_dict())

    def loss(self, scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
        """Cross-entropy of the ghost point nearest to the target, summed over the stages; each starts near it."""
        total = torch.zeros(())
        for stage, reach in zip(self.stages, REACH, strict=True):
            centre = scenes.target + (torch.rand(scenes.target.shape, generator=generator) - 0.5) * reach
            ghosts = draw_ghosts(centre, reach, generator)
            nearest = (ghosts - scenes.target[:, None]).norm(dim=-1).argmin(-1)
            total = total + nn.functional.cross_entropy(stage(ghosts, scenes, reach), nearest)
        return total

    @torch.no_grad()
    def locate(self, scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
        """The target as found (batch, 3): each stage searches around the best ghost point of the one before."""
        found = torch.zeros_like(scenes.target)
        for stage, reach in zip(self.stages, REACH, strict=True):
            ghosts = draw_ghosts(found, reach, generator)
            found = ghosts[torch.arange(len(ghosts)), stage(ghosts, scenes, reach).argmax(-1)]
        return found


def draw_ghosts(centre: torch.Tensor, reach: float, generator: torch.Generator) -> torch.Tensor:
    """Ghost points (batch, GHOSTS, 3) in a cube around `centre` (batch, 3)."""
    return centre[:, None] + (torch.rand(len(centre), GHOSTS, 3, generator=generator) * 2 - 1) * reach


def run(arguments: Arguments, seed: int, tied: bool) -> tuple[dict[str, float], Stages]:
    """Train one network, and measure it on new scenes."""
    torch.manual_seed(seed)
    network = Stages(arguments.width)
    if tied:
        tie(network, [f"stages.{i}" for i in range(len(REACH))])
    optimizer = torch.optim.Adam(network.parameters(), lr=arguments.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(arguments.steps):
        loss = network.loss(draw_scenes(arguments.batch, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_tied(network)
    unseen = torch.Generator().manual_seed(10_000)
    scenes = draw_scenes(1000, unseen)
    with torch.no_grad():
        loss = network.loss(scenes, unseen).item()
    distance = (network.locate(scenes, unseen) - scenes.target).norm(dim=-1)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"parameters": parameters, "loss": loss, "distance": distance.mean().item()}, network


def main() -> None:
    (arguments,) = ScriptParser((Arguments,), description=__doc__).parse()
    results: dict[str, list[dict[str, float]]] = {}
    network = None
    for kind in ("untied", "tied"):
        runs = [run(arguments, seed, kind == "tied") for seed in range(arguments.seeds)]
        results[kind], network = [figures for figures, _ in runs], runs[-1][1]
    table = Table(title=f"Three stages, {arguments.steps} steps, {arguments.seeds} seeds")
    for column in ("blocks", "parameters", "loss", "distance from the target"):
        table.add_column(column)
    for kind, runs in results.items():
        cells = []
        for key in ("loss", "distance"):
            values = [figures[key] for figures in runs]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        table.add_row(kind, f"{runs[0]['parameters']:,}", *cells)
    Console().print(table)
    if arguments.output_dir is not None and network is not None:
        folder = Path(arguments.output_dir)
        save_tied(network, folder)
        write_json({"steps": arguments.steps, **results}, folder / "results.json")


if __name__ == "__main__":
    try:
        main()
    except TyingError as error:
        sys.exit(f"error: {error}")
