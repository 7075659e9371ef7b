"""What a report is read as: a dict, JSON, a table and a picture."""

import json
import sys

import pytest

from hf_tying import tying_report

from ..tiny import untied_model
from .helpers import layers_and_embeddings


@pytest.fixture(params=["live", "folder"])
def report(request, tmp_path):
    model = layers_and_embeddings("portable")
    if request.param == "live":
        return tying_report(model)
    model.save_pretrained(tmp_path / "model")
    return tying_report(tmp_path / "model")


def test_to_dict_is_plain_json_with_the_sums(report):
    content = report.to_dict()
    assert json.loads(json.dumps(content)) == content == json.loads(report.to_json())
    assert len(content["groups"]) == 2
    for figure in ("parameters_saved", "bytes_saved", "optimizer_bytes_saved"):
        assert content[figure] == sum(group[figure] for group in content["groups"]) > 0


def test_a_report_is_made_again_from_its_json(report):
    assert type(report).from_dict(json.loads(report.to_json())) == report


def test_the_text_is_that_of_80_columns(report):
    assert str(report) == report.to_table() == report.to_table(80)


def test_the_picture_is_written_in_the_format_of_its_name(report, tmp_path):
    assert report.plot(tmp_path / "ties.png") == tmp_path / "ties.png"
    assert (tmp_path / "ties.png").read_bytes().startswith(b"\x89PNG\r\n")
    report.plot(str(tmp_path / "ties.svg"))
    assert "<svg" in (tmp_path / "ties.svg").read_text()


def test_a_picture_of_nothing_tied_can_be_drawn(tmp_path):
    tying_report(untied_model("gpt2")).plot(tmp_path / "none.png")
    assert (tmp_path / "none.png").stat().st_size > 1000


def test_without_matplotlib_the_picture_says_what_to_install(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"hf-tying\[plots\]"):
        report.plot(tmp_path / "ties.png")
