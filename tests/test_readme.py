"""The README's recipes run as printed, one after the other, as a reader would type them."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def recipes() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore")
def test_the_recipes_run_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    blocks = recipes()
    assert len(blocks) >= 5
    names = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert "embeddings" in printed and "lm_head.weight" in printed
    assert (tmp_path / "tied-qwen3" / "config.json").is_file()


def test_nothing_is_left_to_fill_in():
    text = README.read_text(encoding="utf-8")
    assert "DEMO_OUTPUT" not in text and "TEST_OUTPUT" not in text
    for place in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (README.parent / place).exists(), place
