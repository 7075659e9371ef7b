"""Runs of `Trainer` that are resumed by another number of processes, or write in another form: see `run_script`.

A case is "engine > kind > steps > name of the run > checkpoint to resume from". An engine is `ddp`, or FSDP2 by the
form of its files, `full` or `sharded`. What it has made lies in `<kind>/<name>.pt`.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_tying import TyingCallback, assert_tied
from hf_tying.parallel.fsdp_files import fsdp_of
from hf_tying.training import save_whole_model, set_accepts_loss_kwargs, train_from
from tests.engines import ROWS, inputs, plain, start
from tests.processes import run_cases
from tests.tiny import tiny_model, without_dropout

FOLDER = Path(os.environ["RUNS"])
# Some versions of Trainer load an optimizer to "cpu:0", a tag that torch.load does not know.
torch.serialization.register_package(90, lambda _: None, lambda held, tag: held if tag == "cpu:0" else None)


class TrainerOf(Trainer):
    """A `Trainer` of an engine. Accelerate has no FSDP on a CPU, so its state is told that it has."""

    def __init__(self, engine: str, **options):
        self.engine = engine
        super().__init__(**options)

    def create_accelerator_and_postprocess(self):
        AcceleratorState._reset_state(), GradientState._reset_state()
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = self.engine != "ddp"
        kind = DistributedType.FSDP if self.is_fsdp_enabled else DistributedType.MULTI_CPU
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = kind
        if self.is_fsdp_enabled:
            AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
                state_dict_type=f"{self.engine.upper()}_STATE_DICT",
            )  # fmt: skip


def rows_of(model) -> list[dict[str, torch.Tensor]]:
    """Six batches of `ROWS`, whatever the number of processes."""
    whole = inputs(model)
    moved = {"input_ids", "labels", "decoder_input_ids"}
    return [
        {name: each[row].roll(shift) if name in moved else each[row] for name, each in whole.items()}
        for shift in range(6)
        for row in range(ROWS)
    ]


def model_of(kind: str) -> PreTrainedModel:
    """A kind of tests/engines.py, or of "stock ..." the model as transformers ties it."""
    torch.manual_seed(0)
    arch = kind.removeprefix("stock ")
    return without_dropout(tiny_model(arch, dtype=torch.float64)) if arch != kind else start(kind)


def run(engine: str, kind: str, steps: str, name: str, checkpoint: str | None = None) -> dict:
    model = set_accepts_loss_kwargs(model_of(kind))
    args = TrainingArguments(
        str(FOLDER / kind / name), max_steps=int(steps), save_steps=2, logging_steps=1, lr_scheduler_type="constant",
        per_device_train_batch_size=ROWS // dist.get_world_size(), learning_rate=1e-2, use_cpu=True, report_to=[],
        disable_tqdm=True,
    )  # fmt: skip
    callbacks = [] if kind.startswith("stock ") else [TyingCallback()]
    trainer = TrainerOf(engine, model=model, args=args, train_dataset=rows_of(model), callbacks=callbacks)
    train_from(trainer, str(FOLDER / kind / checkpoint) if checkpoint else None)
    if callbacks:
        assert_tied(trainer.model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {plain(name): whole(p) for name, p in trainer.model.named_parameters()}
    save_whole_model(trainer)
    if dist.get_rank() == 0:
        torch.save((losses, weights), FOLDER / kind / f"{name}.pt")
    return {
        "wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel if engine == "ddp" else FSDPModule),
        "form": getattr(fsdp_of(trainer), "state_dict_type", None) and fsdp_of(trainer).state_dict_type.name,
    }


def whole(parameter: torch.Tensor) -> torch.Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.clone()


if __name__ == "__main__":
    run_cases({case: partial(run, *case.split(" > ")) for case in sys.argv[1:]})
