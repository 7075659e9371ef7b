"""The `Trainer` of `run_tied_lora.py`: equal batches for all methods, and what a step costs."""

import hashlib
import time

import torch
from torch.utils.data import SequentialSampler
from transformers import Seq2SeqTrainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_tying.training.memory import saved_activations
from hf_tying.training.seeded_order import SeededOrder


class Recorder(TrainerCallback, ExportableState):
    """Seconds of each update, and a digest of the last batch: equal batches in another order end with another one.

    They go with a checkpoint, so that a run that was stopped has those of all its updates.
    """

    def __init__(self):
        self.seconds, self.last_batch = [], None

    def state(self):
        return {"args": {}, "attributes": {"seconds": self.seconds, "last_batch": self.last_batch}}

    def on_train_begin(self, args, state, control, **kwargs):
        vars(self).update(state.stateful_callbacks["Recorder"]["attributes"])

    def on_step_begin(self, args, state, control, **kwargs):
        self._begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available() and not args.use_cpu:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begin)


class RecordedTrainer(Seq2SeqTrainer):
    """A plain `Trainer` where nothing is generated."""

    def __init__(self, *args, recorder: Recorder, **kwargs):
        super().__init__(*args, **kwargs)
        self.recorder = recorder
        self.add_callback(recorder)

    def training_step(self, model, inputs, *args, **kwargs):
        self.recorder.last_batch = hashlib.sha256(inputs["input_ids"].cpu().numpy().tobytes()).hexdigest()[:16]
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, *args, **kwargs):
        return SeededOrder(super()._get_train_sampler(*args, **kwargs), self)

    def _get_eval_sampler(self, eval_dataset):
        # By `group_by_length` the test sentences would be shuffled too, against their references.
        return SequentialSampler(eval_dataset)

    def saved_bytes(self) -> int:
        """What a training step on the first examples keeps for the backward pass."""
        args, data = self.args, self._remove_unused_columns(self.train_dataset, "training")
        batch = self.data_collator([data[i] for i in range(min(args.per_device_train_batch_size, len(data)))])
        half = torch.bfloat16 if args.bf16 else torch.float16
        self.model.train()
        with saved_activations(self.model) as saved:
            with torch.autocast(args.device.type, half, enabled=args.bf16 or args.fp16):
                loss = self.model(**self._prepare_inputs(batch)).loss  # noqa: F841, it holds what was saved
            return saved.bytes
