"""`train_from`: a run that goes on from a checkpoint is the run that was never stopped, whichever checkpoint it is."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_tying import TyingError, tie
from hf_tying.training import train_from
from hf_tying.training.resuming import go_on_by_oneself, ties_as_saved

from ..tiny import layer_pair, shared_names, tiny_model, untied_model, without_dropout

ROWS = 20


def trainer(folder, model=None, **settings):
    ids = torch.randint(3, 60, (ROWS, 6), generator=torch.Generator().manual_seed(0))
    settings = {"logging_steps": 1, "per_device_train_batch_size": 4} | settings
    arguments = TrainingArguments(
        str(folder), save_steps=1, learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True, report_to="none",
        disable_tqdm=True, **settings,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    model = without_dropout(tiny_model("llama")) if model is None else model
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])


def log_of(trained):
    """The log, but for what depends on the clock."""
    clocks = ("runtime", "per_second", "total_flos")
    return [{k: v for k, v in entry.items() if not k.endswith(clocks)} for entry in trained.state.log_history]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 3},  # of five in an epoch
        {"max_steps": 7},
        {"max_steps": 2, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 1.4},
        {"max_steps": 3, "ignore_data_skip": True},
    ],
    ids=str,
)
def test_a_resumed_run_makes_the_steps_that_are_left(settings, tmp_path):
    whole = trainer(tmp_path, **settings)
    last = train_from(whole, None).global_step
    assert last == whole.state.max_steps
    for done in (last, last - 1) if not settings.get("ignore_data_skip") else (last,):
        resumed, steps = trainer(tmp_path / "again", **settings), []
        training_step = resumed.training_step
        resumed.training_step = lambda *a, s=steps, f=training_step, **k: s.append(1) or f(*a, **k)
        assert train_from(resumed, str(tmp_path / f"checkpoint-{done}")).global_step == last
        assert len(steps) == (last - done) * settings.get("gradient_accumulation_steps", 1)
        for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert one.equal(other)
        steps.clear()
        assert train_from(resumed, None).global_step == last  # from the start, by the same trainer
        assert len(steps) == last * settings.get("gradient_accumulation_steps", 1)


LOGS = {
    "a log between two checkpoints, rows by length": {
        "logging_steps": 3,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "group_by_length",
    },
    "logs and evaluations by epochs, rows by the global generator": {
        "logging_strategy": "epoch",
        "eval_strategy": "epoch",
        "gradient_accumulation_steps": 1,
        "accelerator_config": {"use_seedable_sampler": False},
    },
}


@pytest.mark.parametrize("settings", LOGS.values(), ids=LOGS)
def test_a_run_that_was_stopped_has_the_log_and_the_weights_of_one_that_never_was(settings, tmp_path):
    size = 7 if settings["gradient_accumulation_steps"] == 1 else 4  # three steps in an epoch

    def made(folder):
        model = tiny_model("llama", attention_dropout=0.1)
        return trainer(folder, model, max_steps=5, per_device_train_batch_size=size, **settings)

    torch.manual_seed(0)
    whole = made(tmp_path)
    assert train_from(whole, None).training_loss == whole.state.log_history[-1]["train_loss"]
    after, again = torch.rand(3), tmp_path / "again"
    # At the end of an epoch; in the next one, by a checkpoint of the run that went on; after the last step.
    for source, done in ((tmp_path, 3), (again, 4), (again, 5)):
        torch.manual_seed(done)
        resumed = made(again)
        result = train_from(resumed, str(source / f"checkpoint-{done}"))
        assert result.training_loss == whole.state.log_history[-1]["train_loss"]
        assert log_of(resumed) == log_of(whole)
        assert after.equal(torch.rand(3))
        for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert one.equal(other)
    stock = made(tmp_path / "stock")
    stock.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert log_of(stock) != log_of(whole)


@pytest.mark.parametrize("asked", ["last", "true", True, None, "no"])
def test_runs_that_go_on_by_themselves_take_last_alone(asked, tmp_path):
    if asked == "no":
        with pytest.raises(TyingError, match="several runs, and each goes on from .* Give `last`, or leave"):
            go_on_by_oneself("runs/a/checkpoint-2", tmp_path)
        return
    (tmp_path / "run").mkdir()
    go_on_by_oneself(asked, tmp_path)
    if asked is not None:
        with pytest.raises(TyingError, match="has nothing to go on with. Leave the flag out to begin"):
            go_on_by_oneself(asked, tmp_path / "run")


def test_an_interrupted_run_leaves_the_trainer_as_it_was(tmp_path):
    resumed = trainer(tmp_path, max_steps=2)
    resumed.training_step = lambda *args, **kwargs: 1 / 0
    before = resumed.get_batch_samples
    with pytest.raises(ZeroDivisionError):
        train_from(resumed, None)
    assert resumed.get_batch_samples == before


TIED = {
    "none": lambda: tie(untied_model("llama"), "none"),
    "two_way": lambda: tie(untied_model("llama"), "two_way", init_from="output"),
    "layers": lambda: tie(untied_model("llama"), {"layers": layer_pair(untied_model("llama"))}, init_from="mean"),
}


@pytest.mark.parametrize("saved", TIED)
@pytest.mark.parametrize("asked", TIED)
def test_a_run_is_resumed_with_the_ties_of_its_checkpoint_and_no_others(saved, asked, tmp_path):
    TIED[saved]().save_pretrained(tmp_path)
    model = TIED[asked]()
    before = shared_names(model)
    if saved == asked:
        assert ties_as_saved(model, str(tmp_path)) is model
    else:
        with pytest.raises(TyingError, match="was written with .*, and this run has .*--model_name_or_path"):
            ties_as_saved(model, str(tmp_path))
    assert shared_names(model) == before


def test_a_run_that_unties_is_resumed_untied_from_a_checkpoint_after_that(tmp_path):
    TIED["none"]().save_pretrained(tmp_path)
    assert shared_names(ties_as_saved(TIED["two_way"](), str(tmp_path), untie_at=0.5)) == []
