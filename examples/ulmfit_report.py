"""The figures and the pictures of `run_ulmfit.py`."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from ulmfit_data import Data

from hf_tying.metrics import ExpectedCalibrationError, MacroF1, calibration, confusion_matrix
from hf_tying.training import average_predictions
from hf_tying.training.results_file import write_json


def report(output: Path, data: Data, predictions: dict[str, dict], settings: dict[str, Any]) -> None:
    """Write `results.json` and the pictures, and print the figures.

    Args:
        output: folder.
        data: texts and classes.
        predictions: logits of each split and the `temperature`, by direction. Several directions are averaged.
        settings: all flags, which are written beside the figures.
    """
    results: dict[str, Any] = {}
    for split in data.splits:
        parts = {name: _probabilities(found, split, data) for name, found in predictions.items()}
        results[split] = _figures(average_predictions(list(parts.values())), data, split)
        raw = average_predictions([_probabilities(p, split, data, raw=True) for p in predictions.values()])
        results[split]["ece_before"] = _calibration_error(raw, data, split)
        if len(parts) > 1:
            results[split] |= {name: _figures(part, data, split) for name, part in parts.items()}
    results["temperature"] = {name: float(found["temperature"]) for name, found in predictions.items()}
    stages = sorted(output.glob("*/stage.json"))
    results["stages"] = {path.parent.name: json.loads(path.read_text(encoding="utf-8"))["figures"] for path in stages}
    results |= {"classes": data.classes, "settings": settings}
    write_json(results, output / "results.json")
    _print(results, data)
    last = list(data.splits)[-1]
    mean = average_predictions([_probabilities(found, last, data) for found in predictions.values()])
    if find_spec("matplotlib") is None:
        print("No pictures: pip install 'hf-tying[plots]' brings matplotlib.")
    else:
        draw(output, mean, data, last)


def _probabilities(found: dict, split: str, data: Data, raw: bool = False) -> torch.Tensor:
    logits = found[split] if raw else found[split] / found["temperature"]
    return logits.sigmoid() if data.several else logits.softmax(dim=1)


def _figures(probabilities: torch.Tensor, data: Data, split: str) -> dict[str, float]:
    targets = data.targets(split)
    predicted = (probabilities > 0.5).long() if data.several else probabilities.argmax(dim=1)
    right = (predicted == targets).all(dim=1) if data.several else predicted == targets
    metric = MacroF1(config_name="multilabel" if data.several else None)
    macro = metric.compute(predictions=predicted.tolist(), references=targets.long().tolist())
    return {
        "accuracy": float(right.float().mean()),
        **macro,
        "ece": _calibration_error(probabilities, data, split),
        "texts": len(targets),
    }


def _calibration_error(probabilities: torch.Tensor, data: Data, split: str) -> float:
    metric = ExpectedCalibrationError(config_name="multilabel" if data.several else None)
    labels = data.targets(split).long().tolist()
    return metric.compute(predictions=probabilities.tolist(), references=labels)["ece"]


def _print(results: dict[str, Any], data: Data) -> None:
    table = Table(title="ULMFiT")
    for column in ("split", "texts", "accuracy", "macro-F1", "ECE before", "ECE"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in data.splits:
        found = results[split]
        numbers = (f"{found[name]:.4f}" for name in ("accuracy", "macro_f1", "ece_before", "ece"))
        table.add_row(split, str(found["texts"]), *numbers)
    Console().print(table)


def draw(output: Path, probabilities: torch.Tensor, data: Data, split: str) -> None:
    """Draw `confusion_matrix.png` (texts of one class each) and `reliability.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    targets = data.targets(split)
    if not data.several:
        counts = confusion_matrix(probabilities.argmax(dim=1), targets, len(data.classes))
        figure, axes = pyplot.subplots(figsize=(1.5 + 0.6 * len(counts), 1.2 + 0.6 * len(counts)))
        axes.imshow(counts, cmap="viridis")
        names = [name[:20].replace("$", r"\$") for name in data.classes]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="predicted", ylabel="true", title=f"{split}: texts of each class")
        for row, column in (
            [(i, j) for i in range(len(counts)) for j in range(len(counts))] if len(counts) <= 20 else []
        ):
            dark = counts[row, column] < counts.max() / 2
            axes.text(column, row, counts[row, column], ha="center", va="center", color="white" if dark else "black")
        figure.savefig(output / "confusion_matrix.png", bbox_inches="tight", dpi=120)
        pyplot.close(figure)
    found = calibration(probabilities, targets)
    figure, axes = pyplot.subplots(figsize=(4.5, 4.5))
    axes.plot([0, 1], [0, 1], color="#bbbbbb", label="honest")
    filled = found.share > 0
    axes.scatter(found.confidence[filled], found.accuracy[filled], s=20 + 400 * found.share[filled], color="#0072b2")
    axes.set(xlabel="probability of the predicted class", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.set_title(f"{split}: calibration error {found.error:.3f}")
    axes.legend()
    figure.savefig(output / "reliability.png", bbox_inches="tight", dpi=120)
    pyplot.close(figure)
