"""The command line: quick help, clear errors, and `inspect` for people and for programs."""

import json
import shutil
import sys

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_tying import tie
from hf_tying.cli.app import app

from ..processes import run_python
from .examples import example_of

HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "numpy", "tokenizers", "matplotlib"}


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory):
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    folder = tmp_path_factory.mktemp("models") / "tied"
    tie(AutoModelForCausalLM.from_config(config), "two_way", init_from="target").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "arguments", [["--help"], ["demo", "--help"], ["inspect", "--help"], ["export", "--help"]], ids=" ".join
)
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys; from hf_tying.cli import main\n"
        f"sys.argv = ['hf-tying', *{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)"
    )
    assert "Usage: hf-tying" in run_python("-c", code).stdout


def test_inspect_prints_a_table(hf_tying, tied_folder):
    status, output, _ = hf_tying("inspect", tied_folder)
    assert status == 0
    assert "model.embed_tokens.weight" in output and "lm_head.weight" in output
    assert "two_way" in output


def test_inspect_prints_json_for_programs(hf_tying, tied_folder):
    status, output, _ = hf_tying("inspect", tied_folder, "--json")
    assert status == 0
    report = json.loads(output)
    assert report["parameters_saved"] == 64 * 16
    assert report["groups"][0]["names"] == ["model.embed_tokens.weight", "lm_head.weight"]


def test_inspect_draws_a_picture(hf_tying, tied_folder, tmp_path):
    assert hf_tying("inspect", tied_folder, "--plot", tmp_path / "ties.png")[0] == 0
    assert (tmp_path / "ties.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_is_said_before_anything_else(hf_tying, tied_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, output, message = hf_tying("inspect", tied_folder, "--plot", tmp_path / "ties.png")
    assert status == 2 and not output
    assert "--plot needs matplotlib, which is missing: pip install 'hf-tying[plots]'." in message


def test_an_error_is_a_message_and_not_a_traceback(tied_folder):
    config = json.loads((tied_folder / "config.json").read_text())
    broken = tied_folder.parent / "broken [bold]"
    shutil.copytree(tied_folder, broken)
    (broken / "config.json").write_text(json.dumps(config | {"tying": {"version": 1, "scheme": "two_wey"}}))
    result = run_python("-m", "hf_tying", "inspect", broken, check=False)
    assert result.returncode == 3
    assert "two_wey" in result.stderr and "two_way" in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_an_unknown_command_is_a_usage_error(hf_tying):
    status, _, error = hf_tying("tye")
    assert status == 2
    assert "No such command 'tye'" in error


@pytest.mark.parametrize("command", [command.callback.__name__ for command in app.registered_commands])
def test_every_help_has_an_example_the_exit_codes_and_json(hf_tying, command):
    assert example_of(hf_tying, command)[0] == command
    text = " ".join(hf_tying(command, "--help")[1].replace("│", " ").split())
    assert "Exit codes: 0" in text and " --json " in text


def test_the_example_of_plan_runs_and_what_cannot_be_read_ends_with_3(hf_tying, tied_folder, monkeypatch):
    (tied_folder.parent / "my-model").symlink_to(tied_folder)
    monkeypatch.chdir(tied_folder.parent)
    assert hf_tying(*example_of(hf_tying, "plan"))[0] == 0
    status, output, error = hf_tying("plan", "away", "--mesh", "dp=2", "--json")
    assert status == 3 and json.loads(output)["findings"][0]["code"] == "unreadable" and error.startswith("error ")
