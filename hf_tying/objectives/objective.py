"""Objectives for `use_tied_loss`, in place of cross entropy: AL (Inan et al. 2016) and CWT (Godey et al. 2023).

Each is a frozen record of its options, and computes its loss when the model asks for its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..config import TyingError
from ..losses.augmented import augmented_parts
from ..losses.contrastive import check_options, contrastive_weight_tying_loss
from ..losses.options import AugmentedSettings, CrossEntropyOptions
from ..ties.anatomy import Anatomy, roles
from ..ties.slots import find_parameter

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class AugmentedObjective:
    """AL: cross entropy plus `alpha * KL` from a target made of word vectors (see `hf_tying.losses.augmented_loss`).

    The word vectors are the model's input embedding, also in an untied model. It must have as many rows as the softmax
    matrix.

    Args:
        temperature: temperature of both distributions. Default 20, see `augmented_loss`.
        alpha: weight of the divergence, see `augmented_loss`.
        gamma: `alpha / temperature`, see `augmented_loss`.
        detach_target: whether the target gets no gradient, see `augmented_loss`. Default `False`.

    Raises:
        TyingError: for a temperature that is not above 0, a negative alpha or gamma, an infinite one of the three,
            or both alpha and gamma.
    """

    temperature: float = 20.0
    alpha: float | None = None
    gamma: float | None = None
    detach_target: bool = False

    needs_softmax = True  # the loss is computed with the softmax matrix

    def __post_init__(self) -> None:
        try:
            settings = self.settings
        except ValueError as error:
            raise TyingError(f"An augmented objective cannot be made: {error}") from None
        for name in ("temperature", "alpha", "gamma"):
            if getattr(settings, name) == math.inf:
                raise TyingError(f"An augmented objective cannot be made: {name} is infinite.")

    @property
    def settings(self) -> AugmentedSettings:
        """The options as `augmented_parts` takes them."""
        return AugmentedSettings(self.temperature, self.alpha, self.gamma, self.detach_target)

    def loss(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        options: CrossEntropyOptions,
        embedding: torch.Tensor,
        memory_budget: int | None,
    ) -> tuple:
        """The loss in place of the model's cross entropy; the arguments are those of `ContrastiveObjective.loss`.

        Returns:
            The loss, a scalar, and its parts, detached: `"cross_entropy"` and `"augmented"`, whose sum it is.

        Raises:
            TyingError: for class weights, label smoothing, a soft cap of the logits, or `reduction="none"`.
        """
        _refuse_options(options, "The augmented loss", class_weight=None, label_smoothing=0.0, logit_softcap=None)
        total, cross_entropy = augmented_parts(
            hidden,
            weight,
            labels,
            self.settings,
            embedding=embedding,
            bias=bias,
            options=options,
            memory_budget=memory_budget,
        )
        return total, {"cross_entropy": cross_entropy, "augmented": total.detach() - cross_entropy}


@dataclass(frozen=True)
class ContrastiveObjective:
    """CWT, contrastive weight tying (see `hf_tying.losses.contrastive_weight_tying_loss`): no vocabulary projection.

    The loss compares hidden states with rows of the input embedding. The biases of the head, the softmax matrix of an
    untied model, and a scale or a soft cap of the logits have no influence on it.

    Args:
        negatives: choice of the negatives, see `contrastive_weight_tying_loss`. Default `"batch"`.
        num_sampled: number of sampled words, for `negatives="sampled"`.
        temperature: divisor of the products. Default 1.
        stop_gradient: whether the embedding gets no gradient from the loss. Default `False`.
        gather: whether the words of all processes are candidates. Default `False`.

    Raises:
        TyingError: for options that `contrastive_weight_tying_loss` refuses.
    """

    negatives: str = "batch"
    num_sampled: int | None = None
    temperature: float = 1.0
    stop_gradient: bool = False
    gather: bool = False

    needs_softmax = False

    def __post_init__(self) -> None:
        try:
            check_options(self.negatives, self.num_sampled, self.temperature)
        except ValueError as error:
            raise TyingError(f"A contrastive objective cannot be made: {error}") from None

    def loss(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        options: CrossEntropyOptions,
        embedding: torch.Tensor,
        memory_budget: int | None,
    ) -> tuple:
        """The loss in place of the model's cross entropy.

        Args:
            hidden: hidden states that the model multiplies by its softmax matrix, (N, D).
            weight: softmax matrix, (V, D). Not used here.
            labels: labels, (N,), int64. `hidden[i]` predicts `labels[i]`: the model has shifted them.
            bias: bias of the softmax, (V,), or `None`. Not used here.
            options: options of the cross entropy that the model asks for.
            embedding: input embedding, (V, D).
            memory_budget: memory in bytes. Not used here.

        Returns:
            The loss, a scalar, and its only part, detached: `"contrastive"`.

        Raises:
            TyingError: for class weights, label smoothing, or `reduction="none"`.
        """
        _refuse_options(options, "Contrastive weight tying", class_weight=None, label_smoothing=0.0)
        loss = contrastive_weight_tying_loss(
            hidden,
            embedding,
            labels,
            negatives=self.negatives,
            num_sampled=self.num_sampled,
            temperature=self.temperature,
            stop_gradient=self.stop_gradient,
            gather=self.gather,
            ignore_index=options.ignore_index,
            reduction=options.reduction,
            num_items_in_batch=options.num_items_in_batch,
        )
        return loss, {"contrastive": loss.detach()}


Objective = AugmentedObjective | ContrastiveObjective


def _refuse_options(options: CrossEntropyOptions, what: str, **expected: object) -> None:
    if options.reduction == "none":
        raise TyingError(
            f"{what} has one loss for a batch, and this model asks for each token's (reduction='none'). Train it by "
            "cross entropy: use_tied_loss(model)."
        )
    for name, value in expected.items():
        found = getattr(options, name)
        if found is not value and (isinstance(found, torch.Tensor) or found != value):
            value = "a tensor" if isinstance(found, torch.Tensor) else found
            raise TyingError(
                f"{what} has no {name}, and this model's loss has one ({value}). Remove it, or train by cross "
                "entropy: use_tied_loss(model)."
            )


# --- an objective on a model ----------------------------------------------------------------------------------------


def refuse_unfit_objective(model: PreTrainedModel, objective: Objective, label_smoothing: float, backend: str) -> None:
    """Refuse a model, or options of `use_tied_loss`, that cannot have `objective`.

    Raises:
        TyingError: with the reason.
    """
    name = type(model).__name__
    if not isinstance(objective, AugmentedObjective | ContrastiveObjective):
        raise TyingError(
            f"objective={objective!r}: expected an AugmentedObjective or a ContrastiveObjective of "
            "hf_tying.objectives, or None for cross entropy."
        )
    what = type(objective).__name__
    if label_smoothing:
        raise TyingError(f"{what} has no label smoothing, and label_smoothing={label_smoothing}: expected 0.")
    if backend not in ("auto", "torch"):
        raise TyingError(f"{what} is computed by torch alone, and backend={backend!r}: expected 'auto' or 'torch'.")
    found = roles(model)
    if "target" not in found:
        raise TyingError(f"{what} takes its word vectors from the input embedding, and {name} has none.")
    embedding, matrix = (find_parameter(model, found[role].name) for role in ("target", "output"))
    if embedding is None or not embedding.is_floating_point():
        raise TyingError(
            f"The input embedding of {name}, {found['target'].name!r}, is not a floating-point parameter: {what} "
            "takes its word vectors from it."
        )
    axis, sizes = (0, "as many rows") if objective.needs_softmax else (1, "as wide")
    if embedding.shape[axis] != matrix.shape[axis]:
        raise TyingError(
            f"{what} is computed with the input embedding: in {name} it is {tuple(embedding.shape)}, and the softmax "
            f"matrix {tuple(matrix.shape)}: expected one {sizes if axis else f'of {sizes}'}."
        )


def unused_parameters(model: PreTrainedModel, objective: Objective) -> list[str]:
    """Names of the head's trainable parameters that get no gradient from the objective."""
    if objective.needs_softmax:
        return []
    anatomy, frozen = Anatomy(model), vars(model).get("_frozen_names", ())
    slots, matrix = anatomy.slots, anatomy.roles["output"].name
    embedding = slots.get(anatomy.roles["target"].name)
    bias = slots.get(f"{matrix.removesuffix('weight')}bias")
    head = {id(p) for p in (slots.get(matrix), bias) if p is not None and p is not embedding}
    return [name for name, p in slots.items() if id(p) in head and (p.requires_grad or name in frozen)]


def freeze_unused(model: PreTrainedModel, names: list[str]) -> None:
    """Freeze the parameters `names`, and log it: as a warning if the softmax matrix is among them."""
    for name in names:
        find_parameter(model, name).requires_grad_(False)
    if not names:
        return
    vars(model)["_frozen_names"] = tuple(names)
    frozen = f"{type(model).__name__}: {', '.join(names)}: no gradient by this objective, so frozen until it is gone."
    if roles(model)["output"].name in names:
        logger.warning(
            f"{frozen} The model is untied, and its softmax matrix does not learn: recover_lm_head(model) makes one."
        )
    else:
        logger.info(frozen)


def unfreeze_unused(model: PreTrainedModel) -> None:
    """Undo `freeze_unused`, and delete the parts of the last step's loss."""
    for name in vars(model).pop("_frozen_names", ()):
        if (parameter := find_parameter(model, name)) is not None:
            parameter.requires_grad_(True)
    vars(model).pop("loss_parts", None)
