"""Averaged SGD that begins when validation stops getting better: NT-ASGD (Merity et al. 2017, section 3)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

_FILE = "averaging.safetensors"


class Averaging:
    """The mean of a model's parameters after each update, from the moment when `patience` evaluations in a row were no
    better than the best one before them. Training itself goes on from the last parameters, not from the mean.

    Args:
        model: its trained parameters are averaged; a tied one once.
        patience: evaluations; 5 in the paper.
    """

    def __init__(self, model: nn.Module, patience: int):
        self.model, self.patience = model, patience
        self.history: list[float] = []
        self.updates = 0
        self.mean: dict[str, torch.Tensor] | None = None

    def evaluated(self, loss: float) -> None:
        """Remember a validation loss, and begin if it is time."""
        if self.mean is None and len(self.history) > self.patience:
            if loss > min(self.history[: len(self.history) - self.patience]):
                self.mean = {name: p.detach().clone() for name, p in self._parameters()}
        self.history.append(loss)

    @torch.no_grad()
    def updated(self) -> None:
        """After each update of the parameters."""
        if self.mean is None:
            return
        self.updates += 1
        for name, parameter in self._parameters():
            if name not in self.mean:  # untied, or no longer frozen, since it began
                self.mean[name] = parameter.detach().clone()
            self.mean[name].lerp_(parameter, 1 / self.updates)  # the first replaces what was there when it began

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While it is open the model has the mean."""
        if self.mean is None or not self.updates:
            yield
            return
        kept = {name: p.detach().clone() for name, p in self._parameters() if name in self.mean}
        self._put(self.mean)
        try:
            yield
        finally:
            self._put(kept)

    def finish(self) -> None:
        """Leave the model with the mean."""
        if self.updates:
            self._put(self.mean)

    def save(self, folder: Path) -> None:
        """Into a checkpoint's folder."""
        tensors = {f"mean.{name}": value.contiguous() for name, value in (self.mean or {}).items()}
        history = torch.tensor(self.history, dtype=torch.float64)
        save_file(tensors | {"history": history, "updates": torch.tensor(self.updates)}, folder / _FILE)

    def load(self, folder: Path) -> None:
        """What `save` has written; nothing where a run without averaging is gone on with."""
        if not (folder / _FILE).is_file():
            return
        tensors = load_file(folder / _FILE)
        self.history, self.updates = tensors.pop("history").tolist(), int(tensors.pop("updates"))
        places = {name: p.device for name, p in self._parameters()}
        mean = {name.removeprefix("mean."): value for name, value in tensors.items()}
        self.mean = {name: value.to(places[name]) for name, value in mean.items()} or None

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(str(name), p) for name, p in self.model.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def _put(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters():
            if name in values:
                parameter.copy_(values[name])
