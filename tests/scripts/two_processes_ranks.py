"""What one of two processes has lost is told on both, and each row is translated once: started by `run_script`."""

import os
import runpy
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

from hf_tying import TyingCallback, TyingError, assert_tied, tie, untie
from hf_tying.parallel import last_complete_checkpoint
from hf_tying.ties.across_ranks import raised_on_every_rank
from hf_tying.ties.verify import unwrapped
from tests import split_models
from tests.processes import ROOT, run_cases
from tests.tiny import Sentences, tiny_model, untied_model
from tests.tiny_translation import translation_model

FOLDER = os.path.dirname(os.environ["RENDEZVOUS"].removeprefix("file://"))


def tied():
    return tie(untied_model("llama"), "two_way", init_from="output")


def lose_the_tie(model) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def told(act: Callable) -> dict:
    """The errors of both processes, and how long the slower one took."""
    start = time.monotonic()
    try:
        act()
        error = None
    except TyingError as raised:
        error = str(raised)
    found = [None, None]
    dist.all_gather_object(found, (error, time.monotonic() - start))
    return {"errors": [error for error, _ in found], "seconds": max(seconds for _, seconds in found)}


def lost() -> dict:
    model = tied()
    if dist.get_rank() == 1:
        lose_the_tie(model)
    return told(lambda: assert_tied(model, across_ranks=True))


def untied_alone() -> dict:
    """Each process is tied as it declares, and the second one declares less; then its config alone says so."""
    model = tied()
    if dist.get_rank() == 1:
        untie(model)
    found = told(lambda: assert_tied(model, across_ranks=True))
    other = tied()
    if dist.get_rank() == 1:
        other.config.tying = None
    return {**found, "config": told(lambda: assert_tied(other, across_ranks=True))["errors"]}


def foreign_error() -> dict:
    """An error that is not of a tie."""
    errors = [None, None]
    try:
        with raised_on_every_rank():
            if dist.get_rank() == 1:
                raise ValueError("not ours")
    except (ValueError, TyingError) as error:
        dist.all_gather_object(errors, f"{type(error).__name__}: {error}")
    return {"errors": errors}


def drifted() -> dict:
    model = tied()
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.lm_head.weight[3, 5] += 1e-6
    found = told(lambda: assert_tied(model, across_ranks=True))
    wrapped = DistributedDataParallel(model)  # which takes the values of rank 0
    return {**found, "wrapped": told(lambda: assert_tied(wrapped, across_ranks=True))["errors"]}


def sharded() -> dict:
    """Two shards are no copies of one another; whoever holds the same shard must have the same."""
    model = tied()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    found = {"shards": told(lambda: assert_tied(model, across_ranks=True))["errors"]}
    replicated = tied()
    fully_shard(replicated, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    found["copies"] = told(lambda: assert_tied(replicated, across_ranks=True))["errors"]
    if dist.get_rank() == 0:
        with torch.no_grad():
            replicated.lm_head.weight.to_local()[0, 0] += 1
    return {**found, "drifted": told(lambda: assert_tied(replicated, across_ranks=True))["errors"]}


class Loses(TrainerCallback):
    """Loses the tie of process 1 after the second step, or within the third."""

    def __init__(self, at: str = "step_end", lose: Callable = lose_the_tie) -> None:
        self.at, self.lose = at, lose

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.at == "step_end" and state.global_step == 2 and dist.get_rank() == 1:
            self.lose(unwrapped(model))

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        if self.at == "substep_end" and state.global_step == 2 and dist.get_rank() == 1:
            self.lose(unwrapped(model))


def trainer(model, name: str, *callbacks, **options) -> Trainer:
    args = TrainingArguments(
        f"{FOLDER}/{name}", max_steps=4, per_device_train_batch_size=2, use_cpu=True, report_to=[], **options
    )
    return Trainer(model=model, args=args, train_dataset=Sentences(), callbacks=[*callbacks, TyingCallback()])


def in_mid_run(stock: bool = False, loses: TrainerCallback | None = None, **options) -> dict:
    model = tiny_model("llama", tie_word_embeddings=True) if stock else tied()
    running = trainer(model, f"lost {stock}", loses or Loses(), save_strategy="no", **options)
    found = told(running.train)
    return {**found, "step": running.state.global_step}


def before_a_save() -> dict:
    """Lost in the step that ends in a save: nothing of it is written."""
    running = trainer(tied(), "before a save", Loses(), save_strategy="steps", save_steps=2)
    return {**told(running.train), "written": os.listdir(running.args.output_dir)}


def saved() -> dict:
    # Some versions of Trainer load an optimizer to "cpu:0", a tag that torch.load does not know.
    torch.serialization.register_package(90, lambda _: None, lambda held, tag: held if tag == "cpu:0" else None)
    running = trainer(tied(), "saved", save_strategy="steps", save_steps=2)
    running.train()
    found = last_complete_checkpoint(running.args.output_dir)
    resumed = trainer(tied(), "saved", save_strategy="no")
    resumed.train(resume_from_checkpoint=found)
    files = sorted(os.listdir(found))
    return {"last": os.path.basename(found), "files": files, "steps": resumed.state.global_step}


def translated() -> dict:
    """The rows that the trainer of run_translation.py gives for five of them, beside the labels of these rows."""
    trainer_class = runpy.run_path(str(ROOT / "examples" / "run_translation.py"))["OrderedTrainer"]
    model = translation_model("marian")
    args = Seq2SeqTrainingArguments(
        f"{FOLDER}/translated", per_device_eval_batch_size=2, use_cpu=True, report_to=[], predict_with_generate=True
    )
    rows = [{"input_ids": torch.tensor([i, 2]), "labels": torch.tensor([i, i, 2])} for i in range(10, 15)]
    found = trainer_class(model=model, args=args).predict(rows, max_length=4)
    return {"labels": found.label_ids[:, 0].tolist(), "translations": len(found.predictions)}


CASES = {
    "lost": lost,
    "drifted": drifted,
    "sharded": sharded,
    "untied alone": untied_alone,
    "foreign error": foreign_error,
    "in mid-run": in_mid_run,
    "in mid-run, a stock class": lambda: in_mid_run(stock=True),
    "in mid-step": lambda: in_mid_run(loses=Loses("substep_end"), gradient_accumulation_steps=2),
    "untied in mid-run": lambda: in_mid_run(loses=Loses(lose=untie)),
    "before a save": before_a_save,
    "saved": saved,
    "translated": translated,
    "split models": split_models.results,
}

if __name__ == "__main__":
    run_cases(CASES)
