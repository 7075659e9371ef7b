"""What a run has left in its folder: its metrics, its log and the shares of the roles in the gradient."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..ties.headers import read_json

#: Where `Trainer` and its example scripts write metrics, the last one first.
_METRICS = ("all_results.json", "predict_results.json", "test_results.json", "eval_results.json")
_STATE = "trainer_state.json"
#: What is measured of the run, and not of the model.
_OF_THE_RUN = ("runtime", "samples", "per_second", "flos", "epoch", "step", "mem_")
_MOST_ROWS = 20


@dataclass(frozen=True)
class Results:
    """The numbers of a run.

    Args:
        metrics: values of the last evaluation by name, without `eval_`.
        log: rows of the log: step, loss of training, loss of evaluation; at most 20.
        shares: by group and role, its share in the gradient of the shared matrix, at the first and at the last log.
        steps: number of steps; `None` where no state of a `Trainer` was found.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    log: list[dict[str, float | int | None]] = field(default_factory=list)
    shares: dict[str, tuple[float, float]] = field(default_factory=dict)
    steps: int | None = None


def read_results(folder: Path) -> Results:
    """Read what `Trainer` has written into `folder`. A file that is missing is no fault, one that is broken is.

    Args:
        folder: output folder of a run.

    Raises:
        TyingError: a file is no JSON.
    """
    states = [folder / _STATE, *sorted(folder.glob(f"checkpoint-*/{_STATE}"), key=_step, reverse=True)]
    state = next((read_json(path) for path in states if path.is_file()), {})
    history = [row for row in state.get("log_history") or [] if isinstance(row, dict)]
    metrics: dict[str, float] = {}
    evaluations = [row for row in history if "eval_loss" in row]
    if evaluations:
        metrics |= _numbers(evaluations[-1])
    for name in reversed(_METRICS):
        if (folder / name).is_file():
            metrics |= _numbers(read_json(folder / name))
    return Results(metrics, _log(history), _shares(history), state.get("global_step"))


def _step(path: Path) -> int:
    step = path.parent.name.rpartition("-")[2]
    return int(step) if step.isdecimal() else -1


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation: `eval_bleu` is `bleu`, `perplexity` is itself, and `train_loss` is none."""
    found = {}
    for name, value in row.items():
        plain = name.removeprefix("eval_").removeprefix("predict_").removeprefix("test_")
        if not isinstance(value, int | float) or isinstance(value, bool) or any(part in plain for part in _OF_THE_RUN):
            continue
        if plain != name or plain == "perplexity":
            found[plain] = value
    return found


def _log(history: list[dict[str, Any]]) -> list[dict[str, float | int | None]]:
    rows: dict[int, dict[str, float | int | None]] = {}
    for row in history:
        if isinstance(row.get("step"), int) and ("loss" in row or "eval_loss" in row):
            kept = rows.setdefault(row["step"], {"step": row["step"], "loss": None, "eval_loss": None})
            kept |= {name: row[name] for name in ("loss", "eval_loss") if isinstance(row.get(name), int | float)}
    listed = list(rows.values())
    if len(listed) <= _MOST_ROWS:
        return listed
    places = {round(i * (len(listed) - 1) / (_MOST_ROWS - 1)) for i in range(_MOST_ROWS)}
    return [listed[place] for place in sorted(places)]


def _shares(history: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for row in history:
        for name, value in row.items():
            place = name.partition("grad_share/")[2]
            if place and isinstance(value, int | float):
                found[place] = (found[place][0] if place in found else value, value)
    return found
