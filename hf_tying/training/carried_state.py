"""The papers' training of a recurrent language model, within `Trainer`.

Batches are contiguous, and the state is carried from each batch to the next one. Losses and learning rates are those
of the papers, and evaluation runs over a whole text.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import TrainOutput
from transformers.utils import ModelOutput

from ..config import TyingError
from ..data.words import ContiguousText
from ..metrics.perplexity import exp_or_infinity
from ..parallel.checkpoints import last_complete_checkpoint
from ..ties.across_ranks import from_every_rank
from ..ties.verify import unwrapped
from .averaging import Averaging

# The most logits of one piece in evaluation, 64 MiB in float32.
_MOST_LOGITS = 2**24
_FILE = "carried_state.safetensors"


@dataclass
class CarriedStateArguments(TrainingArguments):
    """`TrainingArguments` with the defaults and the further settings of the papers."""

    optim: str = field(default="sgd", metadata={"help": "Plain SGD is what the papers use."})
    learning_rate: float = field(default=1.0, metadata={"help": "Learning rate of the first epochs."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Largest norm of all gradients together."})
    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "Order of the batches. sequential is the order of the text."}
    )
    sum_over_time: bool = field(
        default=True,
        metadata={
            "help": "Sum the loss over the steps of a piece and divide it by the batch size, not by the number of "
            "words (Zaremba et al. 2014). The papers' learning rates and clipping are for this loss."
        },
    )
    decay: float = field(default=1.0, metadata={"help": "Factor of the learning rate after each epoch."})
    decay_after: int = field(
        default=0,
        metadata={"help": "Start of the decay. The factor is decay ** max(epoch - decay_after, 0), epochs from 0."},
    )

    average_after: int | None = field(
        default=None,
        metadata={
            "help": "Start averaging the parameters when the loss of an evaluation is above the best loss of all "
            "evaluations before the last average_after ones (NT-ASGD, Merity et al. 2017 section 3). From then on the "
            "mean is evaluated and kept."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # Each process has a part of the columns, the same part in every batch.
        self.accelerator_config.split_batches = True


class CarriedStateTrainer(Trainer):
    """A `Trainer` for a model that takes and returns a `state` (`TiedLSTMForCausalLM`).

    The state starts at zero in each epoch, and is saved with each checkpoint. Training that is resumed in the middle
    of an epoch gives the same numbers, bit for bit. Beside each loss, the log has `train_perplexity` and
    `tokens_per_second`. The perplexity is that of the epoch so far, from the losses in training (with dropout and
    without penalties, as in the papers). The speed is that of training, without evaluation.

    Evaluation reads a text at batch size 1. It predicts all words except the first, and carries the state from the
    first to the last. The metrics are `loss`, `perplexity` and `tokens`.

    Args:
        model: model to train, as for `Trainer`.
        args: training arguments.
        train_dataset: training text, with `args.per_device_train_batch_size` columns for all processes together.
        **kwargs: further arguments of `Trainer`. `eval_dataset` is the ids of a text, (words,), int64, or a dict of
            such texts.

    Raises:
        TyingError: if a dataset is of another kind, or a checkpoint has no state.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: CarriedStateArguments | None = None,
        *,
        train_dataset: ContiguousText | None = None,
        **kwargs: Any,
    ) -> None:
        if train_dataset is not None:
            if not isinstance(train_dataset, ContiguousText):
                raise TyingError(f"train_dataset is a {type(train_dataset).__name__}: expected a ContiguousText.")
            if train_dataset.batch_size != args.per_device_train_batch_size:
                raise TyingError(
                    f"The text has {train_dataset.batch_size} columns, and the batch has "
                    f"{args.per_device_train_batch_size} rows: expected as many, because each row continues that "
                    "of the previous batch."
                )
        kwargs.setdefault("data_collator", default_data_collator)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        if self.args.label_names is None:
            self.label_names = [
                "shift_labels"
            ]  # of a ContiguousText; not an argument by name, which Trainer looks for
        self._epoch = _Epoch()
        self._resumed: Path | None = None
        patience = self.args.average_after
        self.averaging = None if patience is None else Averaging(unwrapped(self.model), patience)
        self.add_callback(_KeepState(self))

    # --- training ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer` does. A resumed run continues with the state of the checkpoint.

        Args:
            resume_from_checkpoint: folder of a checkpoint, or `True` for the last complete one in `args.output_dir`.
            **kwargs: further arguments of `Trainer.train`.

        Raises:
            TyingError: if there is no checkpoint, or it has no state.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise TyingError(f"There is no complete checkpoint in {self.args.output_dir} to resume from.")
        self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self._resumed is not None and not (self._resumed / self._file).is_file():
            raise TyingError(
                f"{self._resumed} has no {self._file}, without which training cannot be resumed: expected a "
                "checkpoint that a CarriedStateTrainer of as many processes wrote."
            )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Make the schedule `decay ** max(epoch - decay_after, 0)`, or the one that `args` asks for."""
        if self.lr_scheduler is None and self.args.decay != 1:
            updates = math.ceil(self.train_dataset.pieces / self.args.gradient_accumulation_steps)  # in an epoch
            decay, after = self.args.decay, self.args.decay_after
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(optimizer, lambda step: decay ** max(step // updates - after, 0))
            self._created_lr_scheduler = True
        elif self.lr_scheduler is None and self.args.lr_scheduler_type == "linear":
            self.args.lr_scheduler_type = "constant"  # linear is Trainer's default, and no recipe has it
        return super().create_scheduler(num_training_steps, optimizer)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, torch.Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """Get the batches of one update, and the divisor of the sum of their losses."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        divisor = self.train_dataset.batch_size
        if not self.args.sum_over_time:
            divisor = divisor * self.train_dataset.time_steps * max(len(batches), 1)
        return batches, torch.tensor(divisor, device=device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ModelOutput]:
        """Compute the loss from the state after the previous batch. No gradient flows into that state."""
        inputs = {**inputs, "state": self._epoch.state, "use_cache": True}
        if num_items_in_batch is not None:
            steps = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            inputs["penalty_share"] = 1 / steps
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._epoch.state = _detached(outputs.state)
        parts = getattr(unwrapped(model), "loss_parts", {})
        self._epoch.count(parts.get("cross_entropy", loss.detach() / self._loss_scale), num_items_in_batch, inputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does, with the perplexity and the speed of the epoch so far beside each loss."""
        if "loss" in logs and self._epoch.words:
            logs |= self._epoch.report()
        super().log(logs, start_time)

    @property
    def _loss_scale(self) -> int:
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    @property
    def _file(self) -> str:
        """The name of the file of the state. Each process has its own, because it has its own columns."""
        return _FILE if self.args.process_index == 0 else f"{self.args.process_index}_{_FILE}"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and into a checkpoint the carried state and the mean of the weights.

        `Trainer` saves the model of a checkpoint before its last file, and before it deletes older ones. In a callback
        both would be over.
        """
        super().save_model(output_dir, _internal_call)
        if not _internal_call or output_dir is None:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)  # of process 0, which may be later
        if self._epoch.state is not None:
            self._epoch.save(folder / self._file)
        if self.averaging is not None and self.args.should_save:
            self.averaging.save(folder)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: torch.Tensor | dict[str, torch.Tensor] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate a whole text at batch size 1, with the state carried from each piece to the next one.

        Args:
            eval_dataset: ids of a text, (words,), int64, or a dict of such texts. Default: the trainer's.
            ignore_keys: without effect.
            metric_key_prefix: start of the names of the metrics. Default `"eval"`.

        Returns:
            `loss` in nats per token, `perplexity`, `tokens` and `runtime` in seconds, with the prefix.

        Raises:
            TyingError: if there is no text of at least two words.
        """
        texts = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(texts, dict):
            metrics = {}
            for name, text in texts.items():
                metrics |= self.evaluate(text, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if not isinstance(texts, torch.Tensor) or texts.ndim != 1 or len(texts) < 2:
            raise TyingError("Nothing to evaluate on: expected the ids of a text, of two words at least.")
        start = time.perf_counter()
        with self.averaging.in_place() if self.averaging is not None and self.is_in_train else nullcontext():
            loss = negative_log_likelihood(unwrapped(self.model), texts) / (len(texts) - 1)
        if self.averaging is not None and self.is_in_train:
            self.averaging.evaluated(loss)
        seconds = time.perf_counter() - start
        self._epoch.start += seconds  # time that is not spent on training
        metrics = {
            "loss": loss,
            "perplexity": exp_or_infinity(loss),
            "tokens": len(texts) - 1,
            "runtime": round(seconds, 4),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@torch.no_grad()
def negative_log_likelihood(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Compute the negative log-likelihood of a text, with the state carried from the first word to the last.

    Args:
        model: a `TiedLSTMForCausalLM`. It is in eval mode meanwhile.
        tokens: (words,), int64.

    Returns:
        The sum over all words except the first, in nats.
    """
    training = model.training
    model.eval()
    length = max(1, min(1024, _MOST_LOGITS // model.config.vocab_size))
    state, total = None, 0.0
    for start in range(0, len(tokens) - 1, length):
        words = tokens[None, start : start + length + 1].to(model.device)
        outputs = model(
            input_ids=words[:, :-1],
            shift_labels=words[:, 1:],
            state=state,
            use_cache=True,
            num_items_in_batch=1,
            return_dict=True,
        )
        state, total = outputs.state, total + float(outputs.loss)
    model.train(training)
    return total


class _Epoch:
    """The state within one epoch, and the sums for its reports."""

    def __init__(self) -> None:
        self.state, self.batches, self.words = None, 0, 0
        self.loss: torch.Tensor | float = 0.0
        self.start, self.timed_words = time.perf_counter(), 0

    def count(self, cross_entropy: torch.Tensor, divisor: torch.Tensor | int, inputs: dict) -> None:
        self.loss = self.loss + (cross_entropy * divisor).double()
        self.words += inputs["input_ids"].numel()
        self.timed_words += inputs["input_ids"].numel()
        self.batches += 1

    def report(self) -> dict[str, float]:
        """Perplexity and speed so far, over the columns of all processes."""
        seconds = time.perf_counter() - self.start
        losses, words, timed = zip(*from_every_rank((float(self.loss), self.words, self.timed_words)), strict=True)
        return {
            "train_perplexity": exp_or_infinity(sum(losses) / sum(words)),
            "tokens_per_second": sum(timed) / seconds,
            "epoch_seconds": seconds,
        }

    def save(self, path: Path) -> None:
        tensors = {f"{i}.{j}": part.contiguous() for i, layer in enumerate(self.state) for j, part in enumerate(layer)}
        tensors |= {"loss": torch.as_tensor(self.loss), "counts": torch.tensor([self.batches, self.words])}
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "_Epoch":
        # By way of the CPU: of several processes there, torch's name of the device is "cpu:0", which no file takes.
        epoch, tensors = cls(), {name: value.to(device) for name, value in load_file(path).items()}
        epoch.batches, epoch.words = tensors.pop("counts").tolist()
        epoch.loss = tensors.pop("loss")
        layers = len(tensors) // 2
        epoch.state = tuple((tensors[f"{i}.0"], tensors[f"{i}.1"]) for i in range(layers))
        return epoch


class _KeepState(TrainerCallback):
    """Start each epoch with a new state or with that of a checkpoint."""

    def __init__(self, trainer: CarriedStateTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.averaging is not None and self.trainer._resumed is not None:
            self.trainer.averaging.load(self.trainer._resumed)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer._epoch = _Epoch()
        if trainer._resumed is not None:
            epoch = _Epoch.load(trainer._resumed / trainer._file, args.device)
            if epoch.batches < trainer.train_dataset.pieces:  # at the end of an epoch there is no state to carry
                trainer._epoch = epoch
            trainer._resumed = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.averaging is not None:
            self.trainer.averaging.updated()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.averaging is not None:
            self.trainer.averaging.finish()


def _detached(state: tuple[tuple[torch.Tensor, torch.Tensor], ...]) -> tuple:
    return tuple(tuple(part.detach() for part in layer) for layer in state)
