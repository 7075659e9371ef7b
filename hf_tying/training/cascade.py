"""Classifier first: the highest layers are trained, frozen, and the layers below them begin again.

Source: "Train your classifier first: Cascade Neural Networks Training from upper layers to lower layers",
arXiv 2102.04697.
"""

from collections.abc import Sequence

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..config import TyingError
from .layers import layer_groups, restart

logger = logging.get_logger(__name__)


class Cascade:
    """The stages of a training from the upper layers to the lower ones.

    In the first stage all layers are trained. At the beginning of each later stage one more group of layers
    (`layer_groups`), from the head down, is frozen with its trained values, and all groups below are drawn anew and
    trained again. Their state in the optimizer is dropped. A matrix that is tied to the head belongs to it.

    Args:
        shares: length of each stage as a share of all steps, which sum to 1; or the number of equal stages, 2 or more.

    Raises:
        TyingError: if `shares` is anything else.
    """

    def __init__(self, shares: int | Sequence[float]) -> None:
        stages = [1 / shares] * shares if isinstance(shares, int) and shares > 1 else shares
        numbers = not isinstance(stages, int | float | str) and all(
            isinstance(s, int | float) and s > 0 for s in stages
        )
        if not numbers or len(stages) < 2 or abs(sum(stages) - 1) > 1e-6:
            raise TyingError(
                f"cascade={shares!r}: expected the number of equal stages, 2 or more, or the share of the steps of "
                "each, two numbers or more that sum to 1."
            )
        self.shares = list(stages)
        self._stage = 0
        self._frozen: list[torch.nn.Parameter] = []

    def begin(self, model: PreTrainedModel, step: int, steps: int) -> None:
        """Prepare a training, also one that is resumed at `step`: what was frozen then is frozen again.

        Raises:
            TyingError: if the model has too few layers.
        """
        groups = layer_groups(model)
        if len(self.shares) > len(groups):
            raise TyingError(
                f"cascade has {len(self.shares)} stages, and {type(model).__name__} {len(groups)} groups of layers "
                f"({', '.join(groups)}): expected at most as many stages, since the lowest group is always trained."
            )
        # The layers of a new stage begin again at its first step, which a run resumed before it has not taken.
        self._stage = self._stage_at(max(0, step - 1), steps) if step else 0
        self._freeze(model)

    def move_to(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer | None, step: int, steps: int) -> None:
        """Begin a new stage if this step is its first one."""
        stage = self._stage_at(step, steps)
        if stage == self._stage:
            return
        self._stage = stage
        groups = list(layer_groups(model).items())
        frozen, lower = groups[len(groups) - stage :], groups[: len(groups) - stage]
        parameters = [p for _, members in lower for p in members if p.requires_grad]
        restart(model, parameters)
        for parameter in parameters if optimizer is not None else []:
            optimizer.state.pop(parameter, None)
        self._freeze(model)
        logger.warning(
            f"Step {step}: stage {stage + 1} of {len(self.shares)}. Frozen: {', '.join(name for name, _ in frozen)}. "
            f"Begun again: {', '.join(name for name, _ in lower)}."
        )

    def end(self) -> None:
        """Make all layers trainable again."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def _stage_at(self, step: int, steps: int) -> int:
        ends = [round(sum(self.shares[: i + 1]) * steps) for i in range(len(self.shares) - 1)]
        return sum(step >= end for end in ends)

    def _freeze(self, model: PreTrainedModel) -> None:
        groups = list(layer_groups(model).values())
        for members in groups[len(groups) - self._stage :]:
            for parameter in members:
                if parameter.requires_grad:
                    self._frozen.append(parameter.requires_grad_(False))
