"""Training without a head (CWT, Godey et al. 2023), and the head that is recovered afterwards."""

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
from ..ties.slots import find_parameter, is_one
from ..ties.tying import refuse_unfit, tie, untie

logger = logging.get_logger(__name__)


class HeadlessTrainer(Trainer):
    """Train a causal or masked language model by contrastive weight tying, in training and evaluation without a
    product with the vocabulary.

    It is `Trainer` on `use_tied_loss(model, objective=...)`: what the model does before its softmax matrix stays (the
    dense layer of a BERT's head too), and what is saved is the whole model. `eval_loss` is the contrastive loss of the
    evaluation batches: it depends on their size, and is no perplexity. There are no logits, so no `compute_metrics`.
    For perplexity, `recover_lm_head(trainer.model)` and a plain `Trainer`.

    Args:
        model: any `PreTrainedModel` with a softmax matrix and `labels`, or one that PEFT has adapted. It keeps the
            objective after training.
        objective: default `ContrastiveObjective()`, the paper's.
        Everything else: as for `Trainer`.

    Raises:
        TyingError: for `compute_metrics`, an objective of another kind, and for what `use_tied_loss` refuses.

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
        """A new model of `model_init`, with the objective."""
        return use_tied_loss(super().call_model_init(trial), objective=self.objective)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """The contrastive loss; no logits."""
        if objective_of(model) is None:  # the head was recovered since
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with evaluated_by_objective(model):
            return super().prediction_step(model, inputs, True, ignore_keys)


def recover_lm_head(
    model: PreTrainedModel,
    train_dataset: Dataset | None = None,
    *,
    how: str = "clone",
    args: TrainingArguments | None = None,
    **trainer_kwargs: Any,
) -> PreTrainedModel:
    """Give a model that was trained without a head its softmax matrix, in place, and train it by cross entropy.

    The objective is taken off; from then on training steps have cross entropy, by blocks (`use_tied_loss`). An
    optimizer made before holds matrices that may no longer be the model's: make it again.

    Args:
        model: any `PreTrainedModel` with a softmax matrix; not one with adapters.
        train_dataset: of the fine-tuning; without it there is none. The paper takes less than 2% of the tokens.
        how: `"clone"`, the paper's: the softmax matrix becomes a copy of the input embedding and is untied, in the
            config too. `"tie"`: it becomes the input embedding.
        args: of the fine-tuning's `Trainer`. Default: one epoch at the paper's learning rate of 1e-4, warmed up over
            a fifth of it, nothing saved. The model's biases of the head are trained again.
        **trainer_kwargs: of `Trainer`, such as `data_collator` (masked language models need theirs), `callbacks`.

    Returns:
        The same model.

    Raises:
        TyingError: for an unknown `how`, `args` or keywords without a dataset, an embedding and a softmax matrix of
            different sizes, and for what `tie`, `untie` and `use_tied_loss` refuse.

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
    use_tied_loss(model)
    embedding, output = (roles(model)[role].name for role in ("target", "output"))
    source, matrix = find_parameter(model, embedding), find_parameter(model, output)
    if source.shape != matrix.shape:
        raise TyingError(
            f"The softmax matrix {output!r} cannot be made of the embedding {embedding!r}: it is "
            f"{tuple(matrix.shape)}, and the embedding {tuple(source.shape)}."
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
            with torch.no_grad():
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
