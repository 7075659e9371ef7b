"""Measurements of a `Trainer`: duration of its steps, digest of its data, size of its states; a line of progress."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from .settings import DemoSettings, TranslationSettings


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread of torch inside this context.

    A model of this size gains little by a second thread, and on a busy machine it can lose much.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_quietly(trainer: Trainer, name: str, seed: int, shown: dict[str, str]) -> None:
    """Train with one progress bar and no other output. At the end, evaluate, and put the model in eval mode.

    Args:
        trainer (`Trainer`): trainer with evaluation by steps.
        name (`str`): name of the model on the bar.
        seed (`int`): seed of dropout, if the model has it.
        shown (`dict[str, str]`): keys of the log to show, with their names on the bar.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_OneLineProgress(name, shown))
    set_seed(seed)
    trainer.train()
    if trainer.state.global_step % trainer.args.eval_steps:
        trainer.evaluate()
    trainer.model.eval()


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Compute the size of the optimizer's states in memory.

    Args:
        optimizer: optimizer after training.
    """
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in states if torch.is_tensor(value))


class RecordingCollator:
    """A collator with a digest of its batches, which shows that two runs had the same data.

    Args:
        collate (`Callable`): collator that makes the batches.
        keys (`tuple[str, ...]`): keys of a batch that go into the digest.
    """

    def __init__(
        self, collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]], keys: tuple[str, ...]
    ) -> None:
        self.digest = hashlib.sha256()
        self._collate, self._keys = collate, keys

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch, and add it to the digest."""
        batch = self._collate(examples)
        for key in self._keys:
            self.digest.update(batch[key].numpy().tobytes())
        return batch


class StepClock(TrainerCallback):
    """A callback that records the seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the time at the start of a step."""
        self._begin = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the seconds of a step."""
        self.seconds.append(time.perf_counter() - self._begin)


class _OneLineProgress(ProgressCallback):
    """The trainer's progress bar with the model's name and the losses, in place of a line for each log."""

    def __init__(self, name: str, shown: dict[str, str]) -> None:
        super().__init__()
        self._name, self._shown = name, shown
        self._losses: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description(f"{self._name:>9}")

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        pass

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for key, label in self._shown.items():
            if key in logs:
                self._losses[label] = f"{logs[key]:.4g}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._losses)


def common_arguments(settings: DemoSettings | TranslationSettings) -> dict[str, Any]:
    """Make the `TrainingArguments` of both demos: a cosine schedule, thirty logs, six evaluations.

    Args:
        settings: settings of the demo.
    """
    return {
        "output_dir": str(settings.output_dir),
        "seed": settings.seed,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.steps // 10,
        "weight_decay": 0.1,
        "adam_beta2": 0.98,
        "logging_steps": max(1, settings.steps // 30),
        "eval_strategy": "steps",
        "eval_steps": math.ceil(settings.steps / 6),
        "save_strategy": "no",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
    }
