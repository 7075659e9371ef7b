"""Averages of a model's parameters: a moving average, and averaged SGD with a trigger (NT-ASGD).

NT-ASGD starts averaging when the validation loss stops improving (Merity et al. 2017, section 3).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..config import TyingError
from ..ties.sharding import gathered, is_dtensor, is_partitioned, shape_of, whole
from ..ties.slots import is_one, named_slots, shared_names
from ..ties.verify import unwrapped

_FILE = "averaging.safetensors"


@torch.no_grad()
def average_into(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """Move an exponential moving average (EMA) by one step: `averaged = decay * averaged + (1 - decay) * model`.

    A tied matrix is moved once. An average in place over `state_dict().items()` would move it once for each of its
    names.

    Prefer torch's own `AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))` of `torch.optim.swa_utils`,
    which also holds the copy. This function is for a loop with its own copy.

    Args:
        averaged: copy of the model from `copy.deepcopy(model)`, also in another precision or on another device.
        model: model that is trained, also wrapped (DistributedDataParallel, torch.compile).
        decay: weight of the old average, from 0 (the model itself) to 1 (no step). Buffers, and parameters that are
            not floating point, are copied.

    Raises:
        TyingError: if parameters, shapes or ties of the copy differ from those of the model. Nothing is changed then.

    Example:
        >>> averaged = copy.deepcopy(model).requires_grad_(False)
        >>> optimizer.step()
        >>> average_into(averaged, model, decay=0.999)
    """
    averaged, model = unwrapped(averaged), unwrapped(model)
    kept, slots = named_slots(averaged), named_slots(model)
    sizes, wanted = ({name: shape_of(p) for name, p in side.items()} for side in (kept, slots))
    if any(map(is_partitioned, slots.values())) and not any(map(torch.Tensor.numel, kept.values())):
        raise TyingError(
            f"The copy has no values: DeepSpeed ZeRO-3 had partitioned the {type(model).__name__} when it was copied. "
            "Make it by copy.deepcopy(model) before deepspeed.initialize, or inside "
            "deepspeed.zero.GatheredParameters([*model.parameters()])."
        )
    unlike = [name for name in sizes.keys() | wanted.keys() if sizes.get(name) != wanted.get(name)]
    if unlike:
        raise TyingError(
            f"The copy and the model differ in {len(unlike)} parameters, as {min(unlike)!r}. Expected the same names "
            "and shapes: make the copy again, by copy.deepcopy(model)."
        )
    for names in shared_names(kept):
        if not is_one(model, names):
            raise TyingError(
                f"{', '.join(names)} are one parameter in the copy, and not in the model: it has been untied since. "
                f"untie the copy too: untie(averaged, {names[1:]}), or make it again, by copy.deepcopy(model)."
            )
    pairs = {id(kept[name]): (kept[name], slots[name]) for name in kept}
    for mine, theirs in pairs.values():
        with gathered((theirs,)):
            values = (theirs if is_dtensor(mine) else whole(theirs)).to(mine.device, mine.dtype)
            mine.lerp_(values, 1 - decay) if mine.is_floating_point() else mine.copy_(values)
    for mine, theirs in zip(averaged.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)


class Averaging:
    """The mean of a model's parameters over all updates since a trigger.

    The trigger is an evaluation whose loss is above the best loss of all evaluations before the last `patience` ones.
    Training continues from the last parameters, not from the mean.

    Args:
        model: model whose trained parameters are averaged, a tied one once.
        patience: number of evaluations; 5 in the paper.
    """

    def __init__(self, model: nn.Module, patience: int) -> None:
        self.model, self.patience = model, patience
        self.history: list[float] = []
        self.updates = 0
        self.mean: dict[str, torch.Tensor] | None = None

    def evaluated(self, loss: float) -> None:
        """Record a validation loss, and start averaging if it is the trigger."""
        if self.mean is None and len(self.history) > self.patience:
            if loss > min(self.history[: len(self.history) - self.patience]):
                self.mean = self._values()
        self.history.append(loss)

    @torch.no_grad()
    def updated(self) -> None:
        """Add the parameters to the mean. Call it after each update."""
        if self.mean is None:
            return
        self.updates += 1
        for name, parameter in self._parameters():
            with gathered((parameter,)):
                if name not in self.mean:  # untied, or no longer frozen, since averaging began
                    self.mean[name] = parameter.detach().clone()
                self.mean[name].lerp_(parameter, 1 / self.updates)  # the first update replaces the initial values

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the mean into the model for the length of this context."""
        if self.mean is None or not self.updates:
            yield
            return
        kept = {name: value for name, value in self._values().items() if name in self.mean}
        self._put(self.mean)
        try:
            yield
        finally:
            self._put(kept)

    def finish(self) -> None:
        """Put the mean into the model for good."""
        if self.updates:
            self._put(self.mean)

    def save(self, folder: Path) -> None:
        """Write mean and history into the folder of a checkpoint."""
        tensors = {f"mean.{name}": value.contiguous() for name, value in (self.mean or {}).items()}
        history = torch.tensor(self.history, dtype=torch.float64)
        save_file(tensors | {"history": history, "updates": torch.tensor(self.updates)}, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` has written. A folder of a run without averaging has no such file, and changes nothing."""
        if not (folder / _FILE).is_file():
            return
        tensors = load_file(folder / _FILE)
        self.history, self.updates = tensors.pop("history").tolist(), int(tensors.pop("updates"))
        places = {name: p.device for name, p in self._parameters()}
        mean = {name.removeprefix("mean."): value for name, value in tensors.items()}
        self.mean = {name: value.to(places[name]) for name, value in mean.items()} or None

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _values(self) -> dict[str, torch.Tensor]:
        """Copies of the parameters, whole also where ZeRO-3 has partitioned them."""
        named = self._parameters()
        with gathered(p for _, p in named):
            return {name: p.detach().clone() for name, p in named}

    @torch.no_grad()
    def _put(self, values: dict[str, torch.Tensor]) -> None:
        named = [(name, p) for name, p in self._parameters() if name in values]
        with gathered((p for _, p in named), write=True):
            for name, parameter in named:
                parameter.copy_(values[name])
