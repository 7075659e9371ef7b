"""`hf-tying inspect`: exit codes 0, 1, 2 and 3, with JSON and without, and what a terminal is sent."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_tying import tie

from ..processes import run_python
from ..tiny import tiny_model, untied_model


@pytest.fixture
def folder(tmp_path):
    tie(untied_model("llama"), "two_way", init_from="target").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def broken(tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(64, 16)}, file, {"format": "pt"})
    return tmp_path / "broken"


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["table", "json"])
def test_a_model_that_is_tied_as_it_declares_ends_with_0(hf_tying, folder, as_json):
    assert hf_tying("inspect", folder, *as_json)[0] == 0


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["table", "json"])
def test_a_broken_tie_ends_with_1_and_is_in_the_output(hf_tying, broken, as_json, tmp_path):
    status, output, _ = hf_tying("inspect", broken, *as_json, "--plot", tmp_path / "ties.png")
    assert status == 1 and "T001" in output and (tmp_path / "ties.png").exists()
    if as_json:
        report = json.loads(output)
        assert report["findings"][0] | {"message": "", "mend": ""} == {
            "code": "T001", "severity": "error", "message": "", "mend": "", "group": report["groups"][0]["name"],
        }  # fmt: skip
        assert report["groups"][0]["status"] == "broken" and report["groups"][0]["apart"] == ["lm_head.weight"]
    else:
        assert "BROKEN" in output


def test_the_json_names_its_schema_its_command_and_its_source(hf_tying, folder):
    report = json.loads(hf_tying("inspect", folder, "--json")[1])
    assert (report["schema"], report["command"], report["source"]) == (1, "inspect", str(folder))
    assert report["findings"] == []


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "SOURCE"),
        (["--yson"], "No such option"),
        (["--plot", "ties.wmf"], "expected one of"),
        (["--plot", "nowhere/ties.png"], "is no folder"),
        (["--html", "/"], "is a directory"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_wrong_usage_ends_with_2_before_anything_is_read(hf_tying, folder, arguments, says):
    status, output, error = hf_tying("inspect", *([folder] if arguments else []), *arguments)
    assert status == 2 and not output and says in " ".join(error.replace("│", " ").split())


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["table", "json"])
@pytest.mark.parametrize("fault", ["no folder", "no weights", "not JSON"])
def test_what_cannot_be_read_ends_with_3(hf_tying, folder, fault, as_json, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if fault == "no weights":
        (folder / "model.safetensors").unlink()
    elif fault == "not JSON":
        (folder / "config.json").write_text("{\x1b[2J")
    status, output, error = hf_tying("inspect", folder / "away" if fault == "no folder" else folder, *as_json)
    assert status == 3 and error.startswith("error ") and "\x1b[2J" not in error
    if as_json:
        (finding,) = json.loads(output)["findings"]
        assert finding["severity"] == "error" and finding["code"] == "unreadable"
    else:
        assert not output


def test_a_pipe_gets_80_columns_and_no_codes_of_terminals(broken):
    done = run_python("-m", "hf_tying", "inspect", broken, check=False, environment={"COLUMNS": None})
    assert done.returncode == 1 and "\x1b" not in done.stdout
    body = done.stdout.replace(f"{broken}\n", "")
    assert max(map(len, body.splitlines())) <= 80
