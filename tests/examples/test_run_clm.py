"""`examples/run_clm.py` as a user runs it: train, stop, resume, with flags and with a file."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from hf_tying import TyingError

from ..processes import run_python

SCRIPT = Path(__file__).parents[2] / "examples" / "run_clm.py"
STEPS = 6


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "count.txt"
    path.write_text("".join(f"{i} and {i + 1} and {i * i % 97} make a line.\n" for i in range(600)))
    return path


@pytest.fixture(scope="module")
def flags(text):
    return {
        "model_type": "llama",
        "config_overrides": "hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2,"
        "num_key_value_heads=2,attention_dropout=0.1",
        "vocab_size": 300,
        "train_file": str(text),
        "block_size": 32,
        "scheme": "two_way",
        "do_train": True,
        "do_eval": True,
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "load_best_model_at_end": True,
        "use_cpu": True,
        "disable_tqdm": True,
    }


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "flags.yaml").write_text(yaml.safe_dump(flags | {"output_dir": str(folder / "out")}))
    return run_python(SCRIPT, folder / "flags.yaml", check=False), folder / "out"


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def test_it_trains_a_tied_model_and_measures_perplexity(uninterrupted):
    result, folder = uninterrupted
    assert result.returncode == 0, result.stderr
    assert 1 < results(folder)["eval_perplexity"] < 300
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert (folder / "tokenizer.json").exists()


def test_an_lstm_is_trained_and_measured_as_well(flags, tmp_path, as_script):
    lstm = {"model_type": "tied_lstm", "config_overrides": "embedding_size=16,hidden_size=16"}
    (tmp_path / "flags.json").write_text(json.dumps(flags | lstm | {"output_dir": str(tmp_path / "out")}))
    result = as_script(SCRIPT, tmp_path / "flags.json")
    assert result.returncode == 0, result.stderr
    assert 1 < results(tmp_path / "out")["eval_perplexity"] < 320  # words


def test_resuming_ends_where_the_uninterrupted_run_ends(
    uninterrupted, flags, tmp_path, as_script, told_with_transformers
):
    _, folder = uninterrupted
    resumed = flags | {
        "output_dir": str(tmp_path / "out"),
        "resume_from_checkpoint": str(folder / f"checkpoint-{STEPS // 2}"),
    }
    (tmp_path / "flags.json").write_text(json.dumps(resumed))
    result = as_script(SCRIPT, tmp_path / "flags.json")
    assert result.returncode == 0, result.stderr
    # What `Trainer` says of any tied model.
    missing = [line for line in told_with_transformers if "missing" in line.lower()]
    assert all("missing keys" in line and "['lm_head.weight']" in line for line in missing), missing
    # The first half is not trained again: it leaves no checkpoint here.
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    assert results(tmp_path / "out")["eval_loss"] == results(folder)["eval_loss"]


def test_a_saved_model_is_tuned_further_from_the_command_line(uninterrupted, text, tmp_path, monkeypatch):
    _, folder = uninterrupted
    flags = [
        *("--model_name_or_path", folder, "--train_file", text, "--validation_file", text, "--block_size", 32),
        *("--do_train", "--max_steps", 1, "--use_cpu", "--log_roles", "--logging_steps", 1, "--save_strategy", "no"),
        *("--output_dir", tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
    runpy.run_path(str(SCRIPT))["main"]()
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert any(key.startswith("grad_share/") for log in history for key in log)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_file": "missing.txt"}, "There is no file 'missing.txt'"),
        ({"block_size": 2000}, "shorter than one block of 2000"),
        ({"block_size": 3000}, "--block_size 3000 is more than the 2048 positions of this llama"),
        ({"scheme": "two-way"}, "--scheme 'two-way' in .* expected one of none, two_way"),
        ({"model_name_or_path": "gpt2"}, "one of --model_name_or_path"),
    ],
    ids=["missing file", "long blocks", "longer blocks", "unknown scheme", "two models"],
)
def test_bad_input_is_named_and_nothing_is_written(flags, changes, message, tmp_path, monkeypatch):
    (tmp_path / "flags.json").write_text(json.dumps(flags | {"output_dir": str(tmp_path / "out")} | changes))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "flags.json")])
    with pytest.raises(TyingError, match=message):
        runpy.run_path(str(SCRIPT))["main"]()
    assert not (tmp_path / "out").exists()


def test_an_error_ends_the_script_with_its_message(tmp_path, as_script):
    flags = ["--model_type", "llama", "--do_train", "--train_file", "missing.txt", "--output_dir", tmp_path / "out"]
    result = as_script(SCRIPT, *flags)
    assert result.returncode == 1
    assert result.stderr.endswith(
        "error: There is no file 'missing.txt'. Expected text in a .txt, .json, .jsonl or .csv file."
    )


# --- in this process -------------------------------------------------------------------------------------------------


@pytest.fixture
def clm(flags, tmp_path, monkeypatch):
    """Runs `main` with the module's flags in a file, a few changed, and more beside it."""
    main = runpy.run_path(str(SCRIPT))["main"]

    def run(*beside, **changes):
        plain = {"eval_strategy": "no", "load_best_model_at_end": False, "output_dir": str(tmp_path / "out")}
        (tmp_path / "flags.yaml").write_text(yaml.safe_dump(flags | plain | changes))
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "flags.yaml"), *map(str, beside)])
        main()
        return tmp_path / "out"

    return run


def test_a_size_stands_before_training_and_a_flag_beside_a_file_overrides_it(clm, tmp_path, capsys):
    (tmp_path / "text.yaml").write_text("learning_rate: 1e-3\n")
    assert yaml.safe_load((tmp_path / "text.yaml").read_text()) == {"learning_rate": "1e-3"}  # text, to YAML
    folder = clm("--max-steps", 1, "--tying_scheme", "none", learning_rate="1e-3", lr_scheduler_type="constant")
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 1
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("llama: ")]
    assert line == "llama: 0.01 M parameters, untied, about 0.1 GB to train"


@pytest.mark.parametrize("when", [2 / 6, 5 / 6], ids=["untied before", "untied after"])
def test_the_last_checkpoint_resumes_also_after_untying(when, clm, tmp_path):
    folder = clm(untie_at=when, save_steps=4, do_eval=False)
    whole = (folder / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "config.json", "checkpoint-6/model.safetensors"):
        (folder / name).unlink()
    import shutil

    shutil.rmtree(folder / "checkpoint-6")
    clm("--resume_from_checkpoint", "last", untie_at=when, save_steps=4, do_eval=False)
    assert (folder / "model.safetensors").read_bytes() == whole


def test_evaluation_alone_needs_no_training_text(uninterrupted, clm, text, tmp_path):
    changes = {"model_type": None, "config_overrides": None, "train_file": None, "do_train": False, "scheme": None}
    folder = clm(model_name_or_path=str(uninterrupted[1]), validation_file=str(text), max_eval_samples=3, **changes)
    assert results(folder)["eval_tokens"] == 3 * 31


def test_a_text_is_streamed_and_forms_may_differ(clm, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} and {i + 1} " * 9}) + "\n" for i in range(60)))
    (tmp_path / "b.csv").write_text("text\n" + "".join(f"{i} and {i + 1} and {i}\n" for i in range(60)))
    folder = clm(
        *("--streaming", "--max_steps", 2, "--max_eval_samples", 4),
        train_file=str(tmp_path / "a.jsonl"),
        validation_file=str(tmp_path / "b.csv"),
    )
    assert results(folder)["eval_tokens"] == 4 * 31


def test_a_config_by_name_is_a_model_from_scratch(uninterrupted, clm):
    changes = {"model_type": None, "config_overrides": "hidden_size=8", "max_steps": 1, "do_eval": False}
    folder = clm(config_name=str(uninterrupted[1]), **changes)
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["head_dim"]) == (8, 1, 4)
