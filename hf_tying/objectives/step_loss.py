"""The loss of one training step under `use_tied_loss`: computed from the hidden states, without their logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers.utils import logging

from ..config import TyingError
from ..losses.cross_entropy import cross_entropy
from ..losses.options import CrossEntropyOptions
from ..losses.split_vocabulary import split_cross_entropy
from ..losses.vocabulary_part import own_part
from ..ties.sharding import is_dtensor
from .objective import Objective

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LossSettings:
    """Settings of a model's loss: the keywords of `use_tied_loss`, with their meaning and defaults."""

    label_smoothing: float = 0.0
    memory_budget: int | None = None
    backend: str = "auto"
    objective: Objective | None = None
    head_dtype: torch.dtype | None = None

    def without_training(self) -> LossSettings:
        """The settings of a pass that is no training step: by plain cross entropy."""
        return replace(self, objective=None, label_smoothing=0.0)


class StepLoss:
    """The loss of one training step: cross entropy by blocks, or an objective in its place.

    Args:
        settings: settings of the model.
        num_items_in_batch: number by which the model will divide a sum of losses. Default `None`: the model has none.
        embedding: (V, D), the input embedding, which an objective needs. Default `None`: the softmax matrix.

    Attributes:
        parts: parts of the objective's loss by name, each a detached scalar, divided as the model will divide the
            loss. Empty until the model has asked for its loss, and with cross entropy.
        was_asked: whether the model has asked for a cross entropy, and got it with these settings.
    """

    def __init__(
        self,
        settings: LossSettings,
        num_items_in_batch: float | torch.Tensor | None = None,
        embedding: torch.Tensor | None = None,
    ) -> None:
        self.settings, self.num_items_in_batch, self.embedding = settings, num_items_in_batch, embedding
        self.parts: dict[str, torch.Tensor] = {}
        self.was_asked = False

    def of_a_metric(self) -> StepLoss:
        """The loss of a metric that the model computes in its step, under `no_grad`: the cross entropy asked for."""
        return StepLoss(self.settings.without_training())

    def compute(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        bias: torch.Tensor | None,
        options: CrossEntropyOptions,
        is_scaled: bool,
    ) -> torch.Tensor:
        """The loss in place of the cross entropy that the model asks for.

        Args:
            hidden: hidden states, (..., D).
            weight: softmax matrix, (V, D).
            target: labels, (...), int64.
            bias: bias of the softmax, (V,), or `None`.
            options: options of the cross entropy.
            is_scaled: whether the model scales or caps its logits.

        Returns:
            A scalar, or (...) for `reduction="none"`.

        Raises:
            TyingError: see `AugmentedObjective.loss` and `ContrastiveObjective.loss`.
        """
        self.was_asked = True
        settings, objective = self.settings, self.settings.objective
        if objective is None and is_dtensor(weight):
            own, bias, part = own_part(weight, bias)
            return split_cross_entropy(hidden, own, target, bias, options, part, settings.memory_budget)
        if objective is None:
            return cross_entropy(hidden, weight, target, bias, options, settings.memory_budget, settings.backend)
        if not objective.needs_softmax and is_scaled:
            logger.warning_once(
                f"{type(objective).__name__} takes no notice of what this model does to its logits (a scale or a soft "
                "cap): it has none."
            )
        # For a tied model, the head's `weight` instead of the parameter: a `RoleMeter` replaces it by a view.
        embedding = weight if self.embedding is None else self.embedding
        loss, parts = objective.loss(hidden, weight, target, bias, options, embedding, settings.memory_budget)
        for name, part in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + part * options.upstream
        return loss

    def expected_upstream(self, reduction: str, device: torch.device) -> float | torch.Tensor:
        """The factor by which the model will multiply the loss, for `CrossEntropyOptions.upstream`.

        A number of items on a GPU stays there, since reading it would wait for the GPU.
        """
        items = self.num_items_in_batch
        if reduction != "sum" or items is None or isinstance(items, torch.Tensor) and items.numel() != 1:
            return 1.0
        if isinstance(items, torch.Tensor) and items.device.type != "cpu":
            return 1.0 / items.reshape(()).to(device, torch.float32)
        return 1.0 / float(items) if float(items) > 0 else 1.0


def needs_deferred(why: str, settings: LossSettings) -> TyingError:
    """The error of a step that cannot have its objective. Such a step is never trained by cross entropy instead."""
    return TyingError(
        f"This training step needs its logits whole ({why}), and {type(settings.objective).__name__} is computed from "
        "the hidden states before them: expected a model that multiplies them by its softmax matrix itself and asks "
        "for the cross entropy of that with its labels. Train it by cross entropy: use_tied_loss(model)."
    )
