"""What a report is read as: a dict, JSON, a table and a picture."""

import builtins
import json

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


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_table_fits_its_width_and_shows_every_name_and_figure(report, width):
    table = report.to_table(width)
    assert max(len(line) for line in table.splitlines()) <= width
    words = "".join(table.replace("│", " ").split())
    if width == 200:  # narrower columns fold the names
        for group in report.groups:
            assert all(name in table for name in group.names)
            assert f"{group.parameters_saved:,}" in table
            assert "x".join(map(str, group.shape)) in words
        assert f"{report.parameters:,}" in table and "two_way" in table
    assert str(report) == report.to_table()


def test_the_picture_is_written_in_the_format_of_its_name(report, tmp_path):
    assert report.plot(tmp_path / "ties.png") == tmp_path / "ties.png"
    assert (tmp_path / "ties.png").read_bytes().startswith(b"\x89PNG\r\n")
    report.plot(str(tmp_path / "ties.svg"))
    drawn = (tmp_path / "ties.svg").read_text()
    for group in report.groups:
        assert all(name in drawn for name in group.names)  # matplotlib notes each text that it draws


def test_a_picture_of_nothing_tied_can_be_drawn(tmp_path):
    tying_report(untied_model("gpt2")).plot(tmp_path / "none.png")
    assert (tmp_path / "none.png").stat().st_size > 1000


def test_without_matplotlib_the_picture_says_what_to_install(report, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"hf-tying\[plots\]"):
        report.plot(tmp_path / "ties.png")
