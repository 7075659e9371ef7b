"""What ULMFiT adds to `Trainer`: slanted triangular rates, gradual unfreezing, ensembles, and labels made by a model.

The discriminative rates are in `hf_tying.training.layers`, the temperature in `hf_tying.training.calibration`.

Source: Howard & Ruder 2018, "Universal Language Model Fine-tuning for Text Classification".
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..config import TyingError
from .calibration import check_classes
from .layers import layer_groups
from .schedules import check_when, step_of

logger = logging.get_logger(__name__)


def slanted_triangular(step: int, steps: int, cut_frac: float = 0.1, ratio: float = 32) -> float:
    """Compute the factor of the learning rate at a step: a short rise, and a long fall.

    Args:
        step: number of updates so far.
        steps: number of all updates.
        cut_frac: share of the updates in which the rate rises. Default 0.1.
        ratio: quotient of the highest rate and the lowest one. Default 32.

    Returns:
        A number from `1 / ratio` to 1.

    Source: Howard & Ruder 2018, equation 3.
    """
    cut = max(1, int(steps * cut_frac))  # the paper's 0, for fewer than 1 / cut_frac updates, divides by 0
    if step < cut:
        share = step / cut
    else:
        share = max(0.0, 1 - (step - cut) / (cut * (1 / cut_frac - 1)))
    return (1 + share * (ratio - 1)) / ratio


def slanted_triangular_schedule(
    optimizer: torch.optim.Optimizer, steps: int, cut_frac: float = 0.1, ratio: float = 32
) -> LambdaLR:
    """Make the schedule of `slanted_triangular` for an optimizer. Each of its groups keeps its own highest rate.

    Args:
        optimizer: optimizer whose rates are the highest ones.
        steps: number of all updates, 1 or more.
        cut_frac: above 0 and below 1. See `slanted_triangular`.
        ratio: 1 or more. See `slanted_triangular`.

    Returns:
        A schedule for `Trainer(optimizers=(optimizer, schedule))`.

    Raises:
        TyingError: if a value is out of range.
    """
    if steps < 1 or not 0 < cut_frac < 1 or not ratio >= 1:
        raise TyingError(
            f"steps={steps}, cut_frac={cut_frac}, ratio={ratio}: expected 1 step or more, a share between 0 and 1, "
            "and a ratio of 1 or more."
        )
    return LambdaLR(optimizer, partial(slanted_triangular, steps=steps, cut_frac=cut_frac, ratio=ratio))


class GradualUnfreezing(TrainerCallback):
    """Train the highest layers first, and one group of layers more in each stage, from the head down.

    The groups are those of `layer_groups`, found in the model that is trained; BERT's are its embeddings, each block,
    and the head with the pooler. Parameters that are frozen when training begins stay frozen. When training ends, all
    are as they were.

    The optimizer has all parameters from the beginning. It skips those that have no gradient, without weight decay.

    Args:
        every: length of a stage. A number of steps (an int from 1), a fraction of all steps (a float above 0, up to
            1.0), or `None`, which is an epoch, as in the paper. Default `None`.

    Raises:
        TyingError: if `every` is out of range. When training begins: if the model has one group only, or there are
            several processes (a parameter that is frozen after the model was wrapped stops them).

    Source: Howard & Ruder 2018 section 3.3.

    Example:
        >>> Trainer(model=bert, args=args, train_dataset=data, callbacks=[GradualUnfreezing()]).train()
    """

    def __init__(self, every: float | int | None = None) -> None:
        check_when("every", every)
        self.every = every
        self._groups: list[tuple[str, list[nn.Parameter]]] = []
        self._stage = -1

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Find the groups, and freeze all that are not trained yet."""
        self._let_go()  # left by a run that was interrupted
        if args.world_size > 1:
            raise TyingError(
                f"GradualUnfreezing needs one process, found {args.world_size}: DistributedDataParallel and sharding "
                "do not know a parameter that is frozen after the model was wrapped."
            )
        trained = {name: [p for p in members if p.requires_grad] for name, members in layer_groups(model).items()}
        self._groups = [(name, members) for name, members in trained.items() if members]
        if len(self._groups) < 2:
            found = ", ".join(name for name, _ in self._groups) or "none"
            raise TyingError(
                f"{type(model).__name__} has no layers to unfreeze one after the other: expected two groups with "
                f"trained parameters at least, found {found}. Leave GradualUnfreezing out."
            )
        self._move_to(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unfreeze the next group at its moment."""
        self._move_to(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make all groups trainable again."""
        self._let_go()

    def _move_to(self, state: TrainerState) -> None:
        if self.every is None:
            stage = int(state.epoch or 0)
        else:
            stage = state.global_step // step_of(self.every, state.max_steps)
        if not self._groups or (stage := min(stage, len(self._groups) - 1)) == self._stage:
            return
        self._stage = stage
        first = len(self._groups) - 1 - stage  # of the groups that are trained
        for place, (_, members) in enumerate(self._groups):
            for parameter in members:
                parameter.requires_grad_(place >= first)
        names = ", ".join(name for name, _ in self._groups[first:])
        logger.info(f"Step {state.global_step}: trained now: {names}.")

    def _let_go(self) -> None:
        for _, members in self._groups:
            for parameter in members:
                parameter.requires_grad_(True)
        self._groups, self._stage = [], -1


@torch.no_grad()
def recompute_norm_statistics(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """Measure the running statistics of all batch normalisations anew, for the trained values of the model.

    In a short training, or one that unfreezes layers on the way, the running mean is still that of earlier values. The
    statistics of evaluation are then not those that the model was trained with.

    Args:
        model: trained model, in place. Dropout is off meanwhile.
        batches: inputs of the model by name, as from `trainer.get_train_dataloader()`. `labels` are left out.

    Statistics that no batch changes (batches of one text) stay as they were, and all do after an error.

    Source: `torch.optim.swa_utils.update_bn`, which keeps dropout on.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [(norm, norm.momentum, copy.deepcopy(dict(norm.named_buffers()))) for norm in norms]
    training = [module for module in model.modules() if module.training]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    device = next(model.parameters()).device
    complete = False
    try:
        for batch in batches if norms else []:
            model(**{name: values.to(device) for name, values in batch.items() if name != "labels"})
        complete = True
    finally:
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            if not (complete and norm.num_batches_tracked):
                norm.load_state_dict(buffers, strict=False)
        model.eval()
        for module in training:
            module.training = True


def average_predictions(probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
    """Average the predictions of several models, such as a forward and a backward one.

    Args:
        probabilities: (texts, classes) of each model, floating point.

    Returns:
        (texts, classes).

    Raises:
        TyingError: if there are none, or the shapes differ.

    Source: Howard & Ruder 2018 section 3.3, bidirectional language model.
    """
    shapes = {tuple(one.shape) for one in probabilities}
    if len(shapes) != 1:
        raise TyingError(f"The predictions have the shapes {sorted(shapes)}: expected one or more of one shape.")
    return torch.stack(list(probabilities)).mean(dim=0)


def pseudo_labels(probabilities: torch.Tensor, threshold: float = 0.9) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose texts without a label that a model is sure of, and give them its label.

    Args:
        probabilities: (texts, classes), floating point, predictions for texts without a label.
        threshold: smallest probability of the label, from 0 to 1. Default 0.9.

    Returns:
        The rows that are chosen, (n,), int64, and their labels, (n,), int64.

    Raises:
        TyingError: if the threshold is out of range, or a prediction is no probability.

    Source: Lee 2013, "Pseudo-Label".
    """
    if not 0 <= threshold <= 1:
        raise TyingError(f"threshold={threshold}: expected a probability from 0 to 1.")
    if not ((probabilities >= 0) & (probabilities <= 1 + 1e-3)).all():
        raise TyingError("The predictions are not from 0 to 1, or NaN: expected probabilities, the softmax of logits.")
    largest, labels = probabilities.max(dim=1)
    rows = (largest >= threshold).nonzero().flatten()
    return rows, labels[rows]


def distillation_labels(
    teacher_logits: torch.Tensor, labels: torch.Tensor | None = None, weight: float = 0.5, temperature: float = 1.0
) -> torch.Tensor:
    """Make the soft labels by which a model is trained on its own predictions (self-distillation).

    Args:
        teacher_logits: (texts, classes), floating point, logits of the model that was trained before.
        labels: (texts,), int64, true classes. Default: none, and the labels are the predictions alone.
        weight: share of the predictions, from 0 to 1; the rest is the true class. Default 0.5.
        temperature: divisor of the logits, above 0. Default 1.

    Returns:
        (texts, classes), distributions: `labels` of a classifier with `problem_type="single_label_classification"`.

    Raises:
        TyingError: if a value is out of range, or a logit is not finite.

    Source: Hinton et al. 2015 section 2; Furlanello et al. 2018, "Born-Again Neural Networks".
    """
    if not 0 <= weight <= 1 or not 0 < temperature < float("inf"):
        raise TyingError(
            f"weight={weight}, temperature={temperature}: expected a share from 0 to 1, and a temperature above 0."
        )
    if not torch.isfinite(teacher_logits).all():
        raise TyingError("The teacher's logits have a NaN or an infinity: expected numbers. Leave these texts out.")
    predicted = (teacher_logits / temperature).softmax(dim=-1)
    if labels is None:
        return predicted
    check_classes(labels, predicted.shape[-1])
    true = nn.functional.one_hot(labels, predicted.shape[-1]).to(predicted)
    return weight * predicted + (1 - weight) * true
