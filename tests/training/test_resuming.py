"""`train_from`: a run that goes on from a checkpoint is the run that was never stopped, whichever checkpoint it is."""

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainingArguments

from hf_tying import TyingError, tie
from hf_tying.data import train_byte_level_bpe
from hf_tying.training import train_from
from hf_tying.training.results_file import begin_run, finished_run, write_json
from hf_tying.training.resuming import go_on_by_oneself, ties_as_saved, vocabulary_as_saved

from ..tiny import layer_pair, shared_names, tiny_model, untied_model, without_dropout

ROWS = 20


def trainer(folder, **settings):
    ids = torch.randint(3, 60, (ROWS, 6), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        str(folder), save_steps=1, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2,
        lr_scheduler_type="constant", use_cpu=True, report_to="none", disable_tqdm=True, **settings,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(without_dropout(tiny_model("llama")), arguments, train_dataset=rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 2, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 1.4},  # five steps in an epoch
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


def test_a_run_is_resumed_with_the_vocabulary_of_its_checkpoint(tmp_path):
    lines = ["an apple a day keeps the doctor away", "the early bird has the worm"]
    saved = train_byte_level_bpe(lines, 300)
    vocabulary_as_saved(saved, str(tmp_path))  # without a tokenizer nothing is compared
    saved.save_pretrained(tmp_path)
    vocabulary_as_saved(saved, str(tmp_path))
    with pytest.raises(TyingError, match=r"\d+ of \d+ tokens have another id now, such as .*--model_name_or_path"):
        vocabulary_as_saved(train_byte_level_bpe(["two birds with one stone"] * 3, 300), str(tmp_path))
    more = train_byte_level_bpe(lines, 300)
    more.add_tokens(["<more>"])
    vocabulary_as_saved(more, str(tmp_path))


def test_a_run_goes_on_with_the_settings_that_it_began_with(tmp_path):
    assert finished_run(tmp_path / "run", {"rate": 1}) is None
    begin_run(tmp_path / "run", {"rate": 1})
    assert finished_run(tmp_path / "run", {"rate": 2}) is None  # nothing was trained yet
    (tmp_path / "run" / "checkpoint-2").mkdir()
    assert finished_run(tmp_path / "run", {"rate": 1}) is None
    with pytest.raises(TyingError, match=r"other settings \(rate 1, now 2\): give another --output_dir"):
        finished_run(tmp_path / "run", {"rate": 2})
    result = {"score": 3, "settings": {"rate": 1}}
    write_json(result, tmp_path / "run" / "result.json")
    assert finished_run(tmp_path / "run", {"rate": 1}) == result
    with pytest.raises(TyingError, match="other settings"):
        finished_run(tmp_path / "run", {"rate": 2})


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


def test_files_of_fsdp_keep_their_form_where_the_best_checkpoint_might_be_of_another(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-2" / "pytorch_model_fsdp_0").mkdir(parents=True)
    resumed = trainer(tmp_path, max_steps=4)
    resumed.args.load_best_model_at_end = True
    fsdp = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", fsdp)
    callbacks = list(resumed.callback_handler.callbacks)
    with pytest.raises(TyingError, match="is of SHARDED_STATE_DICT, this run writes FULL_STATE_DICT.*Set fsdp_state_"):
        train_from(resumed, str(tmp_path / "checkpoint-2"))
    assert fsdp.state_dict_type.name == "FULL_STATE_DICT" and resumed.callback_handler.callbacks == callbacks
    fsdp.set_state_dict_type("SHARDED_STATE_DICT")  # the way out
    with pytest.raises(ValueError, match="only supported when using PyTorch FSDP"):  # Trainer's, which has none
        train_from(resumed, str(tmp_path / "checkpoint-2"))


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
