"""`hf-tying publish`: what is refused, and what a dry run says. tests/hub publishes to a Hub."""

import json
from pathlib import Path

import pytest

from hf_tying import TyingConfig, TyingError, tie, use_projection
from hf_tying.hub import publishing

from ..tied_lora import tied_lora
from ..tiny import tiny_model, untied_model
from .examples import example_of


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tie(untied_model("llama"), "two_way", init_from="target").save_pretrained(root / "tied-llama")
    use_projection(tiny_model("gpt2")).save_pretrained(root / "projection")
    base = tiny_model("llama")
    base.save_pretrained(root / "base")
    base.name_or_path = base.config._name_or_path = str(root / "base")
    tied_lora(base, task_type="CAUSAL_LM").save_pretrained(root / "adapter")
    return root


@pytest.mark.slow
def test_the_example_of_the_help_runs_and_uploads_nothing(hf_tying, models, monkeypatch):
    monkeypatch.chdir(models)
    status, output, _ = hf_tying(*example_of(hf_tying, "publish"))
    assert status == 0 and "2 code blocks of the card ran." in output
    assert "Nothing is uploaded: --dry-run for me/tied-llama." in output
    assert not (models / "tied-llama" / "README.md").exists()


def test_json_is_one_object_of_the_common_form(hf_tying, models):
    arguments = ("--dry-run", "--no-run", "--json", "--license", "mit")
    status, output, _ = hf_tying("publish", models / "tied-llama", "me/x", *arguments)
    report = json.loads(output)
    assert status == 0 and (report["schema"], report["command"]) == (1, "publish")
    assert {"README.md", "config.json", "model.safetensors"} <= report["files"].keys() and report["url"] is None
    assert [finding["mend"] for finding in report["findings"]] == ["--language ...", "--dataset ..."]


def test_a_projection_in_a_stock_class_ends_with_4_until_it_is_agreed_to(hf_tying, models):
    command = ("publish", models / "projection", "me/x", "--dry-run", "--no-run")
    status, _, error = hf_tying(*command)
    assert status == 4 and "merge_projection(model)" in error and "--yes" in error
    assert hf_tying(*command, "--yes")[0] == 0


def test_a_base_model_in_a_folder_ends_with_4_until_its_id_is_told(hf_tying, models):
    command = ("publish", models / "adapter", "me/x", "--dry-run", "--no-run", "--json")
    status, output, error = hf_tying(*command)
    assert status == 4 and "--base-model owner/name" in error
    assert json.loads(output)["findings"][0]["code"] == "undecided"
    status, output, _ = hf_tying(*command, "--base-model", "me/base")
    assert status == 0
    assert {"adapter_config.json", "tied_lora/adapter_config.json"} <= json.loads(output)["files"].keys()
    assert json.loads((models / "adapter" / "adapter_config.json").read_text())["peft_type"] == "TIED_LORA"


def test_what_a_training_keeps_for_itself_is_left_out(hf_tying, models):
    folder = models / "tied-llama"
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "checkpoint-5").mkdir()
    try:
        _, output, _ = hf_tying("publish", folder, "me/x", "--dry-run", "--no-run", "--json")
    finally:
        (folder / "training_args.bin").unlink()
        (folder / "checkpoint-5").rmdir()
    assert json.loads(output)["left_out"] == ["checkpoint-5", "training_args.bin"]


@pytest.mark.parametrize(
    "text, says",
    [("hf_" + "a" * 30, "holds a token of the Hub"), ("{folder}/data.txt", "names"), ("{folder}", "names")],
    ids=["token", "path", "folder"],
)
def test_a_token_or_a_place_on_this_machine_in_a_text_ends_with_1(hf_tying, models, text, says):
    note = models / "tied-llama" / "notes.json"
    note.write_text(json.dumps(text.format(folder=models / "tied-llama")))
    try:
        status, _, error = hf_tying("publish", models / "tied-llama", "me/x", "--dry-run", "--no-run")
    finally:
        note.unlink()
    assert status == 1 and says in error and "notes.json" in error


def test_a_file_that_stock_completes_at_random_ends_with_4_and_its_way_out_with_0(hf_tying, tmp_path):
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    declared = TyingConfig(groups={"words": {"names": names, "relax": {"kind": "scale"}}}, save_format="dedup")
    model = tie(untied_model("llama"), declared, init_from=names[0])
    model.save_pretrained(tmp_path / "once")
    status, _, error = hf_tying("publish", tmp_path / "once", "me/x", "--dry-run", "--no-run")
    assert status == 4 and "random numbers" in error and 'tie(model, TyingConfig(save_format="portable"))' in error
    tie(model, TyingConfig(save_format="portable")).save_pretrained(tmp_path / "whole")
    assert hf_tying("publish", tmp_path / "whole", "me/x", "--dry-run", "--no-run")[0] == 0


@pytest.mark.parametrize("text, refused", [
    ("cd /model", True), ("file:///model/x", True), ('"/model"', True), ("https://huggingface.co/me/model", False),
    ("//x", False), ("/models", False), ("me/model/x", False),
])  # fmt: skip
def test_a_place_is_a_whole_path_and_no_end_of_an_address(text, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/")  # as in a container of no user
    (tmp_path / "README.md").write_text(text)
    if not refused:
        return publishing._refuse_leaks(tmp_path, Path("/model"))
    with pytest.raises(TyingError, match="names '/model'"):
        publishing._refuse_leaks(tmp_path, Path("/model"))


def test_wrong_usage_ends_with_2_and_a_missing_folder_with_3(hf_tying, models):
    assert hf_tying("publish", models / "tied-llama")[0] == 2
    assert hf_tying("publish", models / "away", "me/x", "--dry-run")[0] == 3
