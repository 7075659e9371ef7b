"""`hf-tying doctor`, `tie`, `untie`, `convert`, `diff`: exit codes, JSON, annotations; each help has an example."""

import json
import re
import shlex

import pytest

from hf_tying.cli.app import app
from hf_tying.doctor import diagnose

from ..doctor import planted

COMMANDS = {command.callback.__name__: command.callback for command in app.registered_commands}
#: The commands whose help has an example with these folders; the others have their own tests.
WITH_EXAMPLE = ("inspect", "doctor", "tie", "untie", "convert", "diff")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with `my-model` in it, as the examples name it."""
    planted.tied(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", WITH_EXAMPLE)
def test_the_example_of_a_help_runs(hf_tying, here, command):
    example = re.search(r"Example: hf-tying (.+)", COMMANDS[command].__doc__)[1]
    if "./untied" in example and command == "diff":
        assert hf_tying("untie", "./my-model", "./untied")[0] == 0
    status, output, error = hf_tying(*shlex.split(example))
    assert status == (1 if command == "diff" else 0), error
    assert output


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_a_disease_ends_with_1_and_a_healthy_model_with_0(hf_tying, here, as_json):
    planted.two_matrices(here / "broken")
    assert hf_tying("doctor", here / "my-model", *as_json)[0] == 0
    status, output, _ = hf_tying("doctor", here / "broken", *as_json)
    assert status == 1 and "T001" in output
    if as_json:
        found = json.loads(output)
        assert (found["schema"], found["command"], found["source"]) == (1, "doctor", str(here / "broken"))
        assert found["findings"][0].keys() == {"code", "severity", "message", "mend", "group"}


@pytest.mark.parametrize("plant", [plant for _, plant in planted.PLANTED], ids=lambda plant: plant.__name__)
def test_a_command_that_mends_ends_the_disease(hf_tying, tmp_path, plant):
    plant(tmp_path / "model")
    for i, finding in enumerate(diagnose(tmp_path / "model")):
        for j, command in enumerate(re.findall(r"hf-tying [^;,]*OUT(?: --[\w-]+ [\w.]*\w)*", finding.mend or "")):
            out = tmp_path / f"{i}-{j}"
            chosen = {"OUT": str(out), "SCHEME": "two_way", "ROLE": "target"}
            status, _, error = hf_tying(*[chosen.get(word, word) for word in shlex.split(command)[1:]])
            assert status in (0, None), (command, error)
            assert finding.code not in {each.code for each in diagnose(out)}


def test_codes_are_chosen_and_left_out(hf_tying, here):
    planted.two_matrices(here / "broken")
    assert hf_tying("doctor", here / "broken", "--only", "T005")[0] == 0
    assert hf_tying("doctor", here / "broken", "--ignore", "T001")[0] == 0
    assert hf_tying("doctor", here / "broken", "--only", "T999")[0] == 2


def test_warnings_count_if_strict(hf_tying, here):
    planted.written_twice(here / "twice")
    assert hf_tying("doctor", here / "twice")[0] == 0
    assert hf_tying("doctor", here / "twice", "--strict")[0] == 1


def test_the_forecast_names_rule_version_and_source(hf_tying, here):
    status, output, _ = hf_tying("doctor", here / "my-model", "--for", "transformers,llama.cpp", "--json")
    forecast = json.loads(output)["forecast"]
    assert status == 0 and [each["loader"] for each in forecast] == ["transformers", "llama.cpp"]
    assert all(each["outcome"] == "tie" and each["rule"] and each["version"] and each["source"] for each in forecast)


def test_a_forecast_for_an_adapter_is_refused(hf_tying, here):
    planted.tied_form_alone(here / "adapter")
    status, output, error = hf_tying("doctor", here / "adapter", "--for", "vllm")
    assert status == 3 and "is an adapter" in error and not output


def test_annotations_are_those_of_github(hf_tying, here):
    planted.two_matrices(here / "broken")
    status, output, _ = hf_tying("doctor", here / "broken", "--format", "github")
    line = output.splitlines()[0]
    assert status == 1 and line.startswith("::error file=") and ",title=T001::" in line and "\n" not in line


@pytest.mark.parametrize("command", ["doctor", "untie"])
def test_what_cannot_be_read_ends_with_3(hf_tying, here, command):
    status, output, error = hf_tying(command, here / "away", *([here / "out"] if command == "untie" else []))
    assert status == 3 and error.startswith("error ") and not output and not (here / "out").exists()


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_a_missing_choice_ends_with_4_and_says_which(hf_tying, here, as_json):
    planted.untied(here / "untied")
    status, output, error = hf_tying("tie", here / "untied", "two_way", here / "out", *as_json)
    assert status == 4 and "--init-from" in error and not (here / "out").exists()
    if as_json:
        assert json.loads(output)["findings"][0]["code"] == "undecided"


def test_weights_that_do_not_come_along_are_named(hf_tying, here):
    (here / "my-model" / "flax_model.msgpack").write_text("")
    status, output, _ = hf_tying("untie", here / "my-model", here / "out")
    assert status in (0, None) and "left out: flax_model.msgpack" in output


def test_a_dry_run_writes_nothing(hf_tying, here):
    status, output, _ = hf_tying("untie", here / "my-model", here / "out", "--dry-run", "--json")
    done = json.loads(output)
    assert status == 0 and done["dry_run"] and done["changes"][0]["field"] == "tie_word_embeddings"
    assert not (here / "out").exists()


def test_a_page_is_whole_and_escapes_what_a_file_says(hf_tying, here):
    planted.edit(here / "my-model", architectures=["<script>alert(1)</script>\x1b[2J"])
    assert hf_tying("inspect", here / "my-model", "--html", here / "page.html")[0] == 0
    page = (here / "page.html").read_text()
    assert page.startswith("<!doctype html>") and "<script" not in page and "\x1b" not in page
    assert "http" not in page and "src=" not in page


def test_names_of_a_file_reach_the_terminal_without_controls_and_markup(hf_tying, here):
    planted.edit(here / "my-model", architectures=["[/b] [bold]\x1b[2J"])
    for command in (["inspect"], ["doctor", "--for", "all"]):
        _, output, error = hf_tying(command[0], here / "my-model", *command[1:])
        assert "\x1b" not in output + error and "Traceback" not in output + error
