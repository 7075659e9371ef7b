"""Relaxed weight sharing on data that is symmetric only in part (Wang, Walters & Yu 2022).

    python examples/papers/relaxed_sharing.py --output_dir runs/relaxed

A made-up task with the paper's question. Signals on a ring are filtered by one filter at each place, which is an exact
convolution, or by a filter that changes from place to place: a share `asymmetry` of it is drawn for the place alone,
from a few patterns. A network has one linear filter for each place. Its filters are one parameter (the exact tie), one
parameter with a difference of each place (`relax={"kind": "basis"}`), or free. All are trained on the same few noisy
signals for the same steps, and measured on new ones without noise.

The relaxed tie is expected to be best where the symmetry is approximate: the exact tie cannot learn what differs, and
free filters have too many numbers for the data. A table over the asymmetry and the seeds; with `--output_dir` also
`OUT/results.json` and the curve `OUT/relaxed_sharing.png`. It keeps no checkpoints: a run that was stopped begins
again.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from hf_tying import TyingError, assert_tied, gap, relaxation_penalty, tie
from hf_tying.training.command_line import ScriptParser
from hf_tying.training.results_file import write_json

PLACES, TAPS, PATTERNS = 16, 9, 2
KINDS = ("exact tie", "relaxed tie", "free")


@dataclass
class Arguments:
    asymmetry: str = field(
        default="0,0.1,0.2,0.4,0.8", metadata={"help": "Shares of the filter that differ from place to place."}
    )
    signals: int = field(default=16, metadata={"help": "Signals to train on."})
    noise: float = field(default=0.5, metadata={"help": "Deviation of the noise on what is learned."})
    steps: int = field(default=300, metadata={"help": "Optimizer steps of each network."})
    seeds: int = field(default=3, metadata={"help": "Tasks of each asymmetry; at least 2, for the deviation."})
    penalty: float = field(default=0.5, metadata={"help": "Factor of the penalty on the differences."})
    learning_rate: float = field(default=0.02, metadata={"help": "Adam's."})
    output_dir: str | None = field(default=None, metadata={"help": "Where results.json and the curve go."})


class Places(nn.Module):
    """A linear filter for each place of a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.ModuleList(nn.Linear(TAPS, 1, bias=False) for _ in range(PLACES))

    def forward(self, signals: torch.Tensor) -> torch.Tensor:
        """Filtered signals, (count, PLACES), of `signals` (count, PLACES)."""
        around = windows(signals)
        return torch.cat([place(around[:, i]) for i, place in enumerate(self.places)], dim=1)


def windows(signals: torch.Tensor) -> torch.Tensor:
    """The values around each place, (count, PLACES, TAPS)."""
    return torch.stack([signals.roll(TAPS // 2 - i, dims=1) for i in range(TAPS)], dim=-1)


def true_filters(asymmetry: float, generator: torch.Generator) -> torch.Tensor:
    """A filter for each place, (PLACES, TAPS): one for all, and a share that is a mixture of a few patterns."""
    common = torch.randn(TAPS, generator=generator)
    patterns = torch.randn(PATTERNS, TAPS, generator=generator)
    own = torch.randn(PLACES, PATTERNS, generator=generator) @ patterns / PATTERNS**0.5
    return (1 - asymmetry) * common + asymmetry * own


def run(arguments: Arguments, asymmetry: float, seed: int, kind: str) -> dict[str, float]:
    """Train one network, and measure it on new signals."""
    generator = torch.Generator().manual_seed(seed)
    filters = true_filters(asymmetry, generator)
    signals = torch.randn(arguments.signals, PLACES, generator=generator)
    clean = (windows(signals) * filters).sum(-1)
    seen = clean + arguments.noise * torch.randn(clean.shape, generator=generator)
    unseen = torch.randn(2000, PLACES, generator=generator)
    torch.manual_seed(seed)
    network = Places()
    names = [f"places.{i}.weight" for i in range(PLACES)]
    if kind != "free":
        group = names if kind == "exact tie" else {"names": names, "relax": {"kind": "basis", "filters": PATTERNS}}
        tie(network, {"filters": group}, init_from=names[0])
    optimizer = torch.optim.Adam(network.parameters(), lr=arguments.learning_rate)
    for _ in range(arguments.steps):
        loss = (
            nn.functional.mse_loss(network(signals), seen) + arguments.penalty * relaxation_penalty(network) / PLACES
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_tied(network)
    with torch.no_grad():
        error = nn.functional.mse_loss(network(unseen), (windows(unseen) * filters).sum(-1)).item()
    distances = [distance for group in gap(network).values() for distance in group.values()]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"error": error, "gap": mean(distances) if distances else 0.0, "parameters": parameters}


def draw(results: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    """The curve of the error over the asymmetry."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind in KINDS:
        errors = [[each["error"] for each in results[share][kind]] for share in results]
        middle, spread = [mean(each) for each in errors], [stdev(each) if len(each) > 1 else 0.0 for each in errors]
        axes.errorbar([float(share) for share in results], middle, spread, marker="o", capsize=3, label=kind)
    axes.set(xlabel="asymmetry of the data", ylabel="mean squared error on new signals", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    (arguments,) = ScriptParser((Arguments,), description=__doc__).parse()
    if arguments.output_dir is not None:
        import matplotlib.figure  # noqa: F401  # missing, it is missed before the work
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    table = Table(title=f"Error on new signals: {arguments.steps} steps, {arguments.seeds} seeds")
    for column in ("asymmetry", *KINDS, "gap of the relaxed tie"):
        table.add_column(column)
    for share in arguments.asymmetry.split(","):
        runs = {kind: [run(arguments, float(share), seed, kind) for seed in range(arguments.seeds)] for kind in KINDS}
        results[share] = runs
        cells = [f"{mean([each['error'] for each in runs[kind]]):.4f}" for kind in KINDS]
        table.add_row(share, *cells, f"{mean([each['gap'] for each in runs['relaxed tie']]):.2f}")
    Console().print(table)
    print("Parameters:", ", ".join(f"{kind} {runs[kind][0]['parameters']:.0f}" for kind in KINDS))
    if arguments.output_dir is not None:
        folder = Path(arguments.output_dir)
        write_json({"steps": arguments.steps, "results": results}, folder / "results.json")
        draw(results, folder / "relaxed_sharing.png")


if __name__ == "__main__":
    try:
        main()
    except TyingError as error:
        sys.exit(f"error: {error}")
