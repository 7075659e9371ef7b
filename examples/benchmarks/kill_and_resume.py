"""Training runs that are killed and go on: how many lose a tie, how many cannot be resumed, how far the loss is off.

    python examples/benchmarks/kill_and_resume.py --kills 2                          # to see it run
    python examples/benchmarks/kill_and_resume.py --kills 100 --json kills.json
    python examples/benchmarks/kill_and_resume.py --kills 12 --processes 2           # two of one group, on one CPU

A small tied language model is trained by `Trainer` with `TyingCallback`, and a checkpoint is written after every step.
The run gets SIGKILL: every other time at a moment drawn at random, and else while a checkpoint is written. Of several
processes, all are killed or one alone. A new run takes `last_complete_checkpoint` and trains to the end. Its losses
and its weights are compared with those of a run that nobody has killed: they should be equal to the last bit.

Processes are forked from this one, so that libraries are imported once. Linux and macOS only.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_tying import TyingCallback, TyingError, assert_tied, tie
from hf_tying.parallel import last_complete_checkpoint
from hf_tying.training.command_line import HelpFormatter
from hf_tying.training.resuming import train_from

RESULT, LIMIT = "result.json", 300.0


@dataclass
class Arguments:
    kills: int = field(default=100, metadata={"help": "Runs to kill and to resume."})
    steps: int = field(default=6, metadata={"help": "Optimizer steps of a run, a checkpoint after each."})
    processes: int = field(default=1, metadata={"help": "Processes of a run, joined by gloo on the CPU."})
    seed: int = field(default=0, metadata={"help": "Of the moments."})
    json: str | None = field(default=None, metadata={"help": "Write the outcome of every kill to this file."})


@dataclass
class Outcome:
    """What one killed run has come to."""

    moment: str
    partial: bool  # the newest checkpoint, which Trainer would take, was not whole
    resumed_from: str | None
    resumed: bool
    tied: bool
    loss_apart: float
    weights_apart: float


def train(folder: Path, steps: int, resume: bool) -> None:
    """A whole run; its losses go to a file."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = tie(LlamaForCausalLM(config), "two_way", init_from="output")
    ids = torch.randint(2000, (64, 16), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=1, logging_steps=1, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[TyingCallback()])
    checkpoint = last_complete_checkpoint(folder) if resume else None
    train_from(trainer, checkpoint)
    assert_tied(model, across_ranks=True)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / RESULT).write_text(json.dumps({"losses": losses, "from": checkpoint}), encoding="utf-8")


@contextmanager
def started(folder: Path, arguments: Arguments, resume: bool) -> Iterator[list[int]]:
    """The processes of a run, each in a session of its own; none is left behind."""
    rendezvous = tempfile.NamedTemporaryFile()  # noqa: SIM115
    pids = []
    for rank in range(arguments.processes):
        if (pid := os.fork()) == 0:
            _run(folder, arguments, resume, rank, rendezvous.name)
        pids.append(pid)
    try:
        yield pids
    finally:
        for pid in pids:
            with suppress(ChildProcessError):  # it was waited for, and its number may be another's by now
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)


def _run(folder: Path, arguments: Arguments, resume: bool, rank: int, rendezvous: str) -> None:
    """What a forked process does until its end."""
    status = 1
    try:
        os.setsid()
        log = os.open(folder / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        if (size := arguments.processes) > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(size), "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"}
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
        train(folder, arguments.steps, resume)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def finished(pids: list[int]) -> bool:
    """Wait for all processes of a run; whether all have ended well. If one fails, the others are not waited for."""
    waiting, end = set(pids), time.monotonic() + LIMIT
    while waiting and time.monotonic() < end:
        for pid in list(waiting):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done and status:
                return False
            waiting -= {done}
        time.sleep(0.01)
    return not waiting


def killed_at(folder: Path, pids: list[int], moment: str, arguments: Arguments, seconds: float) -> bool:
    """Wait for the moment, and kill one process or all; `False` if the run was over before."""
    step, seconds = random.randint(1, arguments.steps), random.uniform(0, seconds)
    end = time.monotonic() + (seconds if moment == "at random" else LIMIT)
    while time.monotonic() < end and (moment == "at random" or not _is_writing(folder, step)):
        if (folder / RESULT).exists():
            return False
        time.sleep(0.001)
    if moment != "at random":
        time.sleep(random.uniform(0, 0.02))
    if (folder / RESULT).exists():
        return False
    for pid in pids if len(pids) == 1 or random.random() < 0.5 else random.sample(pids, 1):
        os.kill(pid, signal.SIGKILL)
    return True


def _is_writing(folder: Path, step: int) -> bool:
    """Whether the checkpoint of a step has been begun."""
    return any((folder / f"checkpoint-{step}").glob("*")) or any((folder / f"checkpoint-{step + 1}").glob("*"))


def weights_of(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    """The parameters in the last checkpoint of a run that has come to its end; it must be tied."""
    model = AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{steps}")
    assert_tied(model)
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        raise TyingError(f"{folder}: not tied.")
    return dict(model.named_parameters())


def kill_one(number: int, arguments: Arguments, losses: list[float], weights: dict, seconds: float) -> Outcome:
    """Start a run, kill it, resume it, and compare."""
    moment = "at random" if number % 2 else "in a save"
    while True:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            with started(folder, arguments, resume=False) as pids:
                if not killed_at(folder, pids, moment, arguments, seconds):
                    continue
            newest = get_last_checkpoint(folder)
            whole = last_complete_checkpoint(folder)
            with started(folder, arguments, resume=True) as pids:
                resumed = finished(pids)
            found = json.loads((folder / RESULT).read_text()) if resumed else {"losses": [], "from": None}
            apart = [abs(a - b) for a, b in zip(found["losses"], losses, strict=False)]
            apart += [float("inf")] * (len(found["losses"]) != len(losses))
            outcome = Outcome(
                moment, newest != whole, found["from"] and Path(found["from"]).name, resumed, False,
                max(apart, default=float("inf")), float("inf"),
            )  # fmt: skip
            if not resumed:
                shutil.copytree(folder, tempfile.mkdtemp(prefix="not-resumed-"), dirs_exist_ok=True)
                return outcome
            with suppress(TyingError):
                own = weights_of(folder, arguments.steps)
                outcome.tied = True
                outcome.weights_apart = max((own[name] - value).abs().max().item() for name, value in weights.items())
            return outcome


def main() -> None:
    """Do what the command line says."""
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    (arguments,) = parser.parse_args_into_dataclasses()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    random.seed(arguments.seed)
    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory() as scratch:
        start = time.monotonic()
        with started(Path(scratch), arguments, resume=False) as pids:
            if not finished(pids):
                raise SystemExit(Path(scratch, "log-0.txt").read_text(encoding="utf-8"))
        seconds = time.monotonic() - start
        losses = json.loads(Path(scratch, RESULT).read_text(encoding="utf-8"))["losses"]
        weights = weights_of(Path(scratch), arguments.steps)
    outcomes = []
    for number in range(arguments.kills):
        outcomes.append(outcome := kill_one(number, arguments, losses, weights, seconds))
        console.print(f"{number + 1}: {outcome}", markup=False, highlight=False)
    report = {
        "kills": len(outcomes),
        "processes": arguments.processes,
        "newest checkpoint not whole": sum(outcome.partial for outcome in outcomes),
        "resumed": sum(outcome.resumed for outcome in outcomes),
        "resumed from a checkpoint": sum(outcome.resumed_from is not None for outcome in outcomes),
        "lost ties": sum(outcome.resumed and not outcome.tied for outcome in outcomes),
        "largest difference of a loss": max((outcome.loss_apart for outcome in outcomes), default=0.0),
        "largest difference of a weight": max((outcome.weights_apart for outcome in outcomes), default=0.0),
    }
    console.print(report)
    if arguments.json:
        content = report | {"outcomes": [asdict(outcome) for outcome in outcomes]}
        Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
