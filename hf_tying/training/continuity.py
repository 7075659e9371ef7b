"""What a checkpoint of `Trainer` leaves out, so that a run that was stopped has the log of one that never was."""

import base64
from typing import Any

import numpy as np
import torch
from transformers import IntervalStrategy, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..ties.across_ranks import from_every_rank


class Continuity(TrainerCallback, ExportableState):
    """Keeps in `trainer_state.json` of a checkpoint what a resumed `Trainer` would begin anew.

    - The sum of the losses. The next logged loss, and `train_loss`, would be those of the steps since the checkpoint.
    - The random state at the beginning of the epoch, by which `group_by_length` orders the rows. In the middle of a
      later epoch they would come in another order, some twice and others never.

    A checkpoint in the last step of an epoch is written after the log and the evaluation of that epoch, where they are
    made by epochs. A run that goes on from it would leave them out.

    Args:
        trainer: the trainer. Default `None`: does nothing (of a callback that `Trainer` has made by itself, with
            `restore_callback_states_from_checkpoint`).
        checkpoint: folder that it resumes from. Default `None`: none.
    """

    def __init__(self, trainer: Trainer | None = None, checkpoint: str | None = None) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint
        self.unlogged: list[float] = []  # sums of losses since the last log, by rank
        self.epoch_begin: list[str] = []  # random states, by rank
        self.resumed: dict[str, Any] = {}
        self.begun_at = 0
        self.is_late = False

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` has of it."""
        trainer, kept = self.trainer, {}
        if trainer is not None and self.unlogged:
            is_logged = trainer._globalstep_last_logged == trainer.state.global_step
            kept = {
                "total": trainer._total_loss_scalar,
                "last_logged": trainer._globalstep_last_logged,
                "unlogged": [0.0 for _ in self.unlogged] if is_logged else self.unlogged,
                "epoch_begin": self.epoch_begin,
            }
        return {"args": {}, "attributes": {"kept": kept}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on with the sum of the checkpoint."""
        kept = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("kept")
        self.unlogged, self.is_late, self.resumed, self.begun_at = [], False, {}, state.global_step
        if kept and self.trainer is not None:
            self.resumed = dict(kept)
            ranks = kept["unlogged"]
            own = ranks[args.process_index] if len(ranks) == args.world_size else sum(ranks) / len(ranks)
            self.trainer._tr_loss.fill_(own)
            self.trainer._total_loss_scalar = kept["total"]
            self.trainer._globalstep_last_logged = kept["last_logged"]

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Order the rows as in the epoch that was stopped. `Trainer` sets the state of the checkpoint after that."""
        before = self.resumed.pop("epoch_begin", ())
        if len(before) == args.world_size:
            if args.ignore_data_skip or float(state.epoch).is_integer():  # a new epoch
                self.trainer._load_rng_state(self.checkpoint)
            else:
                held = np.frombuffer(base64.b64decode(before[args.process_index]), dtype=np.uint8)
                torch.set_rng_state(torch.from_numpy(held.copy()))
        now = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
        self.epoch_begin = from_every_rank(now)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Collect what all processes have before a checkpoint; write that of an epoch's last step later."""
        by_epochs = IntervalStrategy.EPOCH in (args.logging_strategy, args.eval_strategy)
        is_last = state.global_step >= state.max_steps or float(state.epoch).is_integer()
        if control.should_save and by_epochs and is_last:
            self.is_late, control.should_save = True, False
        self._collect(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the checkpoint of the last step. Of a run that was over, all of that is there."""
        control.should_save, self.is_late = control.should_save or self.is_late, False
        if self.resumed and state.global_step == self.begun_at:
            control.should_log = control.should_evaluate = control.should_save = False
        self._collect(control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the `train_loss` of a resumed run the mean over all of its steps."""
        if self.resumed and logs is not None and "train_loss" in logs:
            logs["train_loss"] = self.trainer._total_loss_scalar / max(state.global_step, 1)
            state.log_history[-1]["train_loss"] = logs["train_loss"]

    def _collect(self, control: TrainerControl) -> None:
        if self.trainer is not None and (control.should_save or control.should_evaluate):
            self.unlogged = from_every_rank(self.trainer._tr_loss.item())
