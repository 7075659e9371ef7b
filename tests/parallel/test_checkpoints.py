"""The newest checkpoint that is whole: what is damaged or missing is passed over, and told."""

import json
import logging
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from hf_tying import TyingCallback, TyingError, tie
from hf_tying.parallel import last_complete_checkpoint, seal_checkpoint
from hf_tying.training.resuming import resume_path

from ..tiny import Sentences, untied_model, without_dropout


def trainer(folder, **options) -> Trainer:
    torch.manual_seed(0)
    model = without_dropout(tie(untied_model("llama"), "two_way", init_from="output"))
    args = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_steps=2,
        logging_steps=1, **options,
    )  # fmt: skip
    return Trainer(model=model, args=args, train_dataset=Sentences(), callbacks=[TyingCallback()])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six steps with three checkpoints; the folder and its losses."""
    folder = tmp_path_factory.mktemp("run")
    running = trainer(folder)
    running.train()
    return folder, [entry["loss"] for entry in running.state.log_history if "loss" in entry]


@pytest.fixture
def folder(run, tmp_path):
    """A copy of the run, to be damaged."""
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run"


def truncated(path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zeroed(path) -> None:
    """The second half of a file is zeros: what a power cut leaves of pages that were not written."""
    half = path.stat().st_size // 2
    with open(path, "r+b") as file:
        file.seek(half)
        file.write(b"\0" * (path.stat().st_size - half))


def without_seal(checkpoint) -> None:
    (checkpoint / "complete.json").unlink()


def of_another_step(checkpoint) -> None:
    shutil.copy(checkpoint.parent / "checkpoint-2" / "model.safetensors", checkpoint / "model.safetensors")


DAMAGES = {
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "'model.safetensors' is missing"),
    "half of the weights": (lambda c: truncated(c / "model.safetensors"), "bytes, and had"),
    "zeros in the weights": (lambda c: zeroed(c / "model.safetensors"), "has other bytes than when it was complete"),
    "weights of another step": (of_another_step, "has other bytes"),
    "no optimizer": (lambda c: (c / "optimizer.pt").unlink(), "'optimizer.pt' is missing"),
    "half of the optimizer": (lambda c: truncated(c / "optimizer.pt"), "bytes, and had"),
    "zeros in the optimizer": (lambda c: zeroed(c / "optimizer.pt"), "is not whole: its directory is missing"),
    "no scheduler": (lambda c: (c / "scheduler.pt").unlink(), "'scheduler.pt' is missing"),
    "half of a seal": (lambda c: truncated(c / "complete.json"), "cannot be read as JSON"),
    "a seal of another": (
        lambda c: (c / "complete.json").write_text("{}"),
        "is not one that this package has written",
    ),
    "another tie": (
        lambda c: (c / "config.json").write_text((c / "config.json").read_text().replace("two_way", "no_ways")),
        "'tying' entry|`tying` entry",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_its_seal_is_passed_over_and_told(damage, folder, caplog):
    act, why = DAMAGES[damage]
    act(folder / "checkpoint-6")
    before = sorted(os.listdir(folder))
    with caplog.at_level(logging.WARNING, "hf_tying"):
        assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    assert re.search(f"checkpoint-6 is passed over: .*({why})", caplog.text)
    assert sorted(os.listdir(folder)) == before  # nothing is deleted


PARTIAL = {
    "no state": lambda c: (c / "trainer_state.json").unlink(),
    "half of the state": lambda c: truncated(c / "trainer_state.json"),
    "the state of another step": lambda c: shutil.copy(c.parent / "checkpoint-2" / "trainer_state.json", c),
    "no weights": lambda c: (c / "model.safetensors").unlink(),
    "half of the weights": lambda c: truncated(c / "model.safetensors"),
    "no optimizer": lambda c: (c / "optimizer.pt").unlink(),
    "half of the optimizer": lambda c: truncated(c / "optimizer.pt"),
    "no scheduler": lambda c: (c / "scheduler.pt").unlink(),
    "a flipped byte in the optimizer": lambda c: flipped(c / "optimizer.pt"),
}


def flipped(path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("damage", PARTIAL)
def test_without_a_seal_a_checkpoint_is_looked_at_as_it_is(damage, folder):
    without_seal(folder / "checkpoint-6")
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-6")
    PARTIAL[damage](folder / "checkpoint-6")
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")


def test_all_are_passed_over_and_none_is_made_up(folder, caplog):
    for checkpoint in folder.glob("checkpoint-*"):
        truncated(checkpoint / "model.safetensors")
    with caplog.at_level(logging.WARNING, "hf_tying"):
        assert last_complete_checkpoint(folder) is None
    assert "None of the 3 checkpoints" in caplog.text
    assert last_complete_checkpoint(folder / "nowhere") is None


def test_a_resumed_run_goes_on_as_the_undisturbed_one(run, folder):
    truncated(folder / "checkpoint-6" / "optimizer.pt")
    resumed = trainer(folder)
    resumed.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    losses = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert losses == run[1] and len(losses) == 6


def test_the_seal_says_what_is_whole(run):
    seal = json.loads((run[0] / "checkpoint-4" / "complete.json").read_text())
    assert seal["step"] == 4 and seal["tying"]["scheme"] == "two_way"
    assert set(seal["sha256"]) == {"model.safetensors", "training_args.bin"}
    assert "optimizer.pt" in seal["files"]


def test_a_loop_of_ones_own_seals_its_folder(tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    save_file({"w": torch.ones(3)}, checkpoint / "model.safetensors")
    assert last_complete_checkpoint(tmp_path) is None  # of Trainer there is no state
    seal_checkpoint(checkpoint, 3, {"version": 1})
    assert last_complete_checkpoint(tmp_path) == str(checkpoint)
    save_file({"w": load_file(checkpoint / "model.safetensors")["w"] * 2}, checkpoint / "model.safetensors")
    assert last_complete_checkpoint(tmp_path) is None


def arguments(folder, asked) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, report_to=[], resume_from_checkpoint=asked)


def test_the_scripts_flag_takes_the_last_complete_one_and_refuses_a_broken_one_by_name(folder):
    truncated(folder / "checkpoint-6" / "optimizer.pt")
    assert resume_path(arguments(folder, "last")) == str(folder / "checkpoint-4")
    with pytest.raises(TyingError, match="'optimizer.pt' has .* With `last` in its place"):
        resume_path(arguments(folder, str(folder / "checkpoint-6")))


def test_a_checkpoint_without_an_optimizer_is_taken_and_told(folder, caplog):
    checkpoint = folder / "checkpoint-6"
    for name in ("optimizer.pt", "scheduler.pt"):
        (checkpoint / name).unlink()
    seal_checkpoint(checkpoint, 6)  # as `save_only_model` leaves it
    for asked, found in ((checkpoint, checkpoint), ("last", checkpoint), (folder / "checkpoint-4", None)):
        with caplog.at_level(logging.WARNING, "hf_tying"):
            caplog.clear()
            assert resume_path(arguments(folder, str(asked))) == str(found or asked)
        assert ("has no optimizer (it was written with save_only_model)" in caplog.text) is (found is not None)


@pytest.mark.parametrize(("file", "engine"), [("pytorch_model_fsdp.bin", "FSDP"), ("latest", "DeepSpeed")])
def test_a_checkpoint_of_another_engine_is_refused_with_the_way_to_its_weights(file, engine, folder, monkeypatch):
    checkpoint = folder / "checkpoint-6"
    (checkpoint / file).write_text("x")
    seal_checkpoint(checkpoint, 6)
    with pytest.raises(TyingError, match=f"written by {engine}, and this run is one process.*--model_name_or_path"):
        resume_path(arguments(folder, "last"))
    args = arguments(folder, "last")
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    assert resume_path(args) == str(checkpoint)


@pytest.mark.parametrize("prefix", ["", "bf16_"])
def test_a_checkpoint_of_deepspeed_with_another_number_of_processes_is_refused(prefix, folder, monkeypatch):
    checkpoint = folder / "checkpoint-6"
    args = arguments(folder, str(checkpoint))  # of one process
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for rank in range(2):
        part = checkpoint / "global_step6" / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        part.parent.mkdir(exist_ok=True)
        torch.save({}, part)
        seal_checkpoint(checkpoint, 6)
        if rank == 0:
            assert resume_path(args) == str(checkpoint)
    with pytest.raises(TyingError, match="written by 2 processes of DeepSpeed, and this run has 1.*--model_name_or"):
        resume_path(args)
