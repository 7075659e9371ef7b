"""Training without a head by CWT (Godey et al. 2023), and the recovery of the head afterwards."""

import tempfile
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

from ..config import TyingError
from ..objectives.objective import ContrastiveObjective
from ..objectives.tied_loss import evaluated_by_objective, objective_of, use_tied_loss
from ..ties.anatomy import roles
from ..ties.sharding import gathered, is_in_units, refuse_engine, refuse_in_parts, shape_of
from ..ties.slots import find_parameter, is_one
from ..ties.tying import refuse_unfit, tie, untie

logger = logging.get_logger(__name__)


class HeadlessTrainer(Trainer):
    """Train a causal or masked language model by contrastive weight tying (CWT).

    No step of training or evaluation multiplies by the matrix of the vocabulary.

    This is a `Trainer` on `use_tied_loss(model, objective=...)`. Everything that the model does before its softmax
    matrix stays, also the dense layer of a BERT's head, and the whole model is saved. `eval_loss` is the contrastive
    loss of the evaluation batches. It depends on their size, and is not a perplexity. There are no logits, so
    `compute_metrics` is refused. For perplexity, call `recover_lm_head(trainer.model)` and use a plain `Trainer`.

    Args:
        model: any `PreTrainedModel` with a softmax matrix and `labels`, also with PEFT adapters. It keeps the
            objective after training.
        args: training arguments, as for `Trainer`.
        *positional: further positional arguments of `Trainer`.
        objective: the contrastive objective. Default: `ContrastiveObjective()`, the paper's.
        **kwargs: further arguments of `Trainer`.

    Raises:
        TyingError: if `compute_metrics` is given, the objective is of another kind, or `use_tied_loss` refuses the
            model.

    Example:
        >>> HeadlessTrainer(model=model, args=args, train_dataset=data).train()
        >>> recover_lm_head(model, data, args=TrainingArguments("recovered", learning_rate=1e-4, max_steps=200))
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        objective: ContrastiveObjective | None = None,
        **kwargs: Any,
    ) -> None:
        self.objective = ContrastiveObjective() if objective is None else objective
        if not isinstance(self.objective, ContrastiveObjective):
            raise TyingError(
                f"HeadlessTrainer has objective={objective!r}: expected a ContrastiveObjective. For another one: "
                "use_tied_loss(model, objective=...) and a plain Trainer."
            )
        if model is not None:
            use_tied_loss(model, objective=self.objective)
        super().__init__(model, args, *positional, **kwargs)
        if self.compute_metrics is not None:
            raise TyingError(
                "HeadlessTrainer has compute_metrics, and evaluation has no logits to compute them from. Leave it "
                "out, or evaluate after recover_lm_head(model) by a plain Trainer."
            )

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """Make a new model by `model_init`, and give it the objective."""
        return use_tied_loss(super().call_model_init(trial), objective=self.objective)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Compute the contrastive loss of a batch, without logits."""
        if objective_of(model) is None:  # the head has been recovered
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with evaluated_by_objective(model):
            return super().prediction_step(model, inputs, True, ignore_keys)


def recover_lm_head(
    model: PreTrainedModel,
    train_dataset: "Dataset[Any] | None" = None,
    *,
    how: str = "clone",
    args: TrainingArguments | None = None,
    **trainer_kwargs: Any,
) -> PreTrainedModel:
    """Give a model that was trained without a head its softmax matrix, in place, and train it by cross entropy.

    The objective is removed. From then on, the loss of a training step is cross entropy, computed by blocks
    (`use_tied_loss`). An optimizer made before may hold a matrix that no longer belongs to the model: make it again.

    Args:
        model: any `PreTrainedModel` with a softmax matrix, without adapters.
        train_dataset: data of the fine-tuning. Default: no fine-tuning. The paper takes less than 2% of the tokens.
        how: `"clone"` (the default, as in the paper) makes the softmax matrix a copy of the input embedding, and
            unties it, also in the config. `"tie"` makes it the input embedding itself.
        args: training arguments of the fine-tuning. Default: one epoch at the paper's learning rate of 1e-4, with a
            warm-up over a fifth of it, and nothing saved. The biases of the head are trained again.
        **trainer_kwargs: further arguments of `Trainer`, such as `callbacks`, and the `data_collator` that masked
            language models need.

    Returns:
        The same model.

    Raises:
        TyingError: if `how` is unknown, `args` or keywords are given without a dataset, the embedding and the softmax
            matrix have different sizes, or `tie`, `untie` or `use_tied_loss` refuses the model.

    Source: Godey et al. 2023, section 4.2: a clone of the embedding, 10k steps at 1e-4.

    Example:
        >>> recover_lm_head(model, data, args=TrainingArguments("recovered", learning_rate=1e-4, max_steps=200))
    """
    if how not in ("clone", "tie"):
        raise TyingError(f"how={how!r}: expected 'clone' or 'tie'.")
    if train_dataset is None and (args is not None or trainer_kwargs):
        given = ", ".join((["args"] if args is not None else []) + [*trainer_kwargs])
        raise TyingError(f"recover_lm_head has {given} for its fine-tuning and no train_dataset: give it one.")
    refuse_unfit(model, "recover the head of")
    ends = [found.name for role, found in roles(model).items() if role in ("target", "output")]
    if len(ends) == 2 and is_one(model, ends) == (how == "clone"):  # other ties, refused before the loss is another
        refuse_engine(model, "recover the head of")
        if is_in_units(model):
            refuse_in_parts(model, "recover the head of", gathers=True)
    use_tied_loss(model)
    embedding, output = (roles(model)[role].name for role in ("target", "output"))
    source, matrix = find_parameter(model, embedding), find_parameter(model, output)
    if shape_of(source) != shape_of(matrix):
        raise TyingError(
            f"The softmax matrix {output!r} cannot be made of the embedding {embedding!r}: it is "
            f"{tuple(shape_of(matrix))}, and the embedding {tuple(shape_of(source))}."
        )
    name, tied = type(model).__name__, is_one(model, [embedding, output])
    if how == "tie":
        if not tied:
            tie(model, [embedding, output], init_from=embedding)
        logger.info(f"{name}: the softmax matrix {output!r} is the embedding {embedding!r}.")
    else:
        if tied:
            untie(model, [output])
        else:
            with torch.no_grad(), gathered((source, matrix), write=True):
                matrix.copy_(source)
        logger.info(f"{name}: the softmax matrix {output!r} is a copy of the embedding {embedding!r}, untied.")
    if train_dataset is None:
        return model
    with tempfile.TemporaryDirectory() as folder:
        args = args or TrainingArguments(
            folder, num_train_epochs=1, learning_rate=1e-4, warmup_steps=0.2, save_strategy="no", report_to="none"
        )
        result = Trainer(model, args, train_dataset=train_dataset, **trainer_kwargs).train()
    logger.info(f"{name}: fine-tuned by cross entropy in {result.global_step} steps.")
    return model
