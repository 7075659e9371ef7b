"""Train one of the two models with `Trainer` and measure it."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from ..metrics import perplexity_of, sequence_scores
from ..objectives.own_loss import set_accepts_loss_kwargs
from .measuring import RecordingCollator, StepClock, common_arguments, optimizer_bytes, train_quietly
from .settings import DemoSettings

if TYPE_CHECKING:
    import datasets


@dataclass
class Run:
    """A trained model with its measurements.

    Args:
        model (`PreTrainedModel`): trained model, in eval mode.
        tokens (`int`): number of training tokens.
        tokens_per_second (`float`): speed of the step at the lower quartile of durations, without validation. Other
            programs on the machine can only slow a step down.
        optimizer_bytes (`int`): size of AdamW's states in memory.
        perplexity (`float`): perplexity of the validation blocks after the last step.
        data (`str`): digest of all batches in their order.
        history (`list[dict]`): log of the trainer.
    """

    model: PreTrainedModel
    tokens: int
    tokens_per_second: float
    optimizer_bytes: int
    perplexity: float
    data: str
    history: list[dict[str, Any]] = field(repr=False)


def train(
    model: PreTrainedModel,
    name: str,
    settings: DemoSettings,
    training_blocks: "datasets.Dataset",
    validation_blocks: "datasets.Dataset",
    callbacks: list[TrainerCallback] | None = None,
) -> Run:
    """Train `model` in place for `settings.steps` steps.

    Args:
        model (`PreTrainedModel`): model to train.
        name (`str`): name on the progress bar.
        settings (`DemoSettings`): settings of the demo.
        training_blocks (`datasets.Dataset`): training text, `(blocks, block_size)`.
        validation_blocks (`datasets.Dataset`): validation text, `(blocks, block_size)`.
        callbacks (`list[TrainerCallback]`, *optional*): further callbacks.

    Returns:
        `Run`: the model with its measurements.
    """
    collator, clock = _RecordingCollator(), StepClock()
    trainer = Trainer(
        model=set_accepts_loss_kwargs(model),
        args=_arguments(settings),
        data_collator=collator,
        train_dataset=training_blocks,
        eval_dataset=validation_blocks,
        preprocess_logits_for_metrics=sequence_scores,
        compute_metrics=perplexity_of,
        callbacks=[clock, *(callbacks or [])],
    )
    train_quietly(trainer, name, settings.seed, {"loss": "loss", "eval_perplexity": "validation perplexity"})
    tokens_per_step = trainer.args.train_batch_size * settings.block_size
    return Run(
        model=model,
        tokens=tokens_per_step * trainer.state.global_step,
        tokens_per_second=tokens_per_step / sorted(clock.seconds)[len(clock.seconds) // 4],
        optimizer_bytes=optimizer_bytes(trainer.optimizer),
        perplexity=[log["eval_perplexity"] for log in trainer.state.log_history if "eval_perplexity" in log][-1],
        data=collator.digest.hexdigest()[:16],
        history=trainer.state.log_history,
    )


def _arguments(settings: DemoSettings) -> TrainingArguments:
    return TrainingArguments(
        **common_arguments(settings),
        per_device_eval_batch_size=32,
    )


class _RecordingCollator(RecordingCollator):
    """The default collator with a digest. The labels are the inputs, so only these are recorded."""

    def __init__(self) -> None:
        super().__init__(default_data_collator, keys=("input_ids",))
