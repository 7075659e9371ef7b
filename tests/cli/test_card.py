"""`hf-tying card`: exit codes 0, 1, 2 and 3, with JSON and without, and the example of its help."""

import json

import pytest

from hf_tying import tie

from ..tiny import untied_model
from .examples import example_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tied-llama"
    tie(untied_model("llama"), "two_way", init_from="target").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved):
    yield saved
    for name in ("README.md", "tying_card.json"):
        (saved / name).unlink(missing_ok=True)


def test_the_example_of_the_help_runs(hf_tying, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    status, output, _ = hf_tying(*example_of(hf_tying, "card"))
    assert status == 0 and "written" in output
    text = (folder / "README.md").read_text()
    assert "license: apache-2.0" in text and "## What is tied" in text
    assert json.loads((folder / "tying_card.json").read_text())["license"] == "apache-2.0"


def test_a_card_is_printed_and_nothing_is_written(hf_tying, folder):
    status, output, _ = hf_tying("card", folder, "-o", "-", "--repo-id", "me/x")
    assert status == 0 and output.startswith("---\n") and '"me/x"' in output
    assert not (folder / "README.md").exists()


def test_check_ends_with_1_until_the_card_is_written(hf_tying, folder):
    assert hf_tying("card", folder, "--check")[0] == 1
    assert not (folder / "README.md").exists()
    assert hf_tying("card", folder, "--result", "bleu=98.28@me/cldr")[0] == 0
    assert "| bleu | 98.28 | me/cldr |" in (folder / "README.md").read_text()
    assert hf_tying("card", folder, "--check")[0] == 0


def test_json_is_one_object_of_the_common_form(hf_tying, folder):
    status, output, _ = hf_tying("card", folder, "--json", "--license", "mit")
    report = json.loads(output)
    assert status == 0 and (report["schema"], report["command"], report["source"]) == (1, "card", str(folder))
    assert [finding["mend"] for finding in report["findings"]] == ["--language ...", "--dataset ..."]
    assert report["metadata"]["license"] == "mit" and report["changed"]


@pytest.mark.parametrize("arguments", [["--result", "bleu"], ["-o", "file.md"], ["--yson"]], ids=" ".join)
def test_wrong_usage_ends_with_2(hf_tying, folder, arguments):
    status, output, _ = hf_tying("card", folder, *arguments)
    assert status == 2 and not output and not (folder / "README.md").exists()


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_what_cannot_be_read_ends_with_3(hf_tying, folder, as_json):
    status, output, error = hf_tying("card", folder / "away", *as_json)
    assert status == 3 and error.startswith("error ") and "expected a folder of save_pretrained" in error
    if as_json:
        assert json.loads(output)["findings"][0]["severity"] == "error"
