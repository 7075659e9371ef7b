"""Train one of the two models with `Trainer` and measure it."""

import hashlib
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from ..metrics import perplexity_of, sequence_scores
from .settings import DemoSettings


@dataclass
class Run:
    """A trained model and what was measured on it.

    Args:
        model (`PreTrainedModel`): trained, in eval mode.
        tokens (`int`): tokens trained on.
        tokens_per_second (`float`): of the step at the lower quartile, validation not counted: whatever else the
            machine does can only slow a step down.
        optimizer_bytes (`int`): AdamW's states as they were in memory.
        perplexity (`float`): on the validation blocks, after the last step.
        data (`str`): digest of every batch in its order.
        history (`list[dict]`): the trainer's log.
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
    training_blocks,
    validation_blocks,
    callbacks: list[TrainerCallback] | None = None,
) -> Run:
    """Train `model` in place for `settings.steps` steps.

    Args:
        model (`PreTrainedModel`): either of the pair.
        name (`str`): shown on the progress bar.
        settings (`DemoSettings`): steps, sizes, seed.
        training_blocks, validation_blocks (`datasets.Dataset`): `(blocks, block_size)`.
        callbacks (`list[TrainerCallback]`, *optional*): further callbacks.

    Returns:
        `Run`.
    """
    collator, clock = _RecordingCollator(), _StepClock()
    trainer = Trainer(
        model=model,
        args=_arguments(settings),
        data_collator=collator,
        train_dataset=training_blocks,
        eval_dataset=validation_blocks,
        preprocess_logits_for_metrics=sequence_scores,
        compute_metrics=perplexity_of,
        callbacks=[clock, *(callbacks or [])],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_OneLineProgress(name))
    set_seed(settings.seed)  # dropout, where the model has it
    trainer.train()
    if trainer.state.global_step % trainer.args.eval_steps:
        trainer.evaluate()
    model.eval()
    tokens_per_step = trainer.args.train_batch_size * settings.block_size
    return Run(
        model=model,
        tokens=tokens_per_step * trainer.state.global_step,
        tokens_per_second=tokens_per_step / sorted(clock.seconds)[len(clock.seconds) // 4],
        optimizer_bytes=_optimizer_bytes(trainer.optimizer),
        perplexity=[log["eval_perplexity"] for log in trainer.state.log_history if "eval_perplexity" in log][-1],
        data=collator.digest.hexdigest()[:16],
        history=trainer.state.log_history,
    )


def _arguments(settings: DemoSettings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(settings.output_dir),
        seed=settings.seed,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=32,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.steps // 10,
        weight_decay=0.1,
        adam_beta2=0.98,
        logging_steps=max(1, settings.steps // 30),
        eval_strategy="steps",
        eval_steps=math.ceil(settings.steps / 6),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in states if torch.is_tensor(value))


class _RecordingCollator:
    """The default collator, which also keeps a digest of what it gave, to prove that two runs saw the same."""

    def __init__(self):
        self.digest = hashlib.sha256()

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = default_data_collator(examples)
        self.digest.update(batch["input_ids"].numpy().tobytes())
        return batch


class _StepClock(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._begin)


class _OneLineProgress(ProgressCallback):
    """The trainer's own bar with the model's name and the losses on it, in place of a line for each log."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name
        self._losses: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description(f"{self._name:>8}")

    def on_prediction_step(self, args, state, control, **kwargs):
        pass

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key, label in (("loss", "loss"), ("eval_perplexity", "validation perplexity")):
            if key in logs:
                self._losses[label] = f"{logs[key]:.4g}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._losses)
