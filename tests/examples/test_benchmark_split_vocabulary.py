"""`examples/benchmarks/split_vocabulary.py`: one run at a small shape, in one process."""

import json
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


def test_a_run_writes_a_row_for_each_method(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    numbers = tmp_path / "numbers.json"
    monkeypatch.setattr(sys, "argv", ["split_vocabulary.py", "--quick", "--processes", "1", "--json", str(numbers)])
    runpy.run_path(str(FOLDER / "split_vocabulary.py"), run_name="__main__")
    rows = {row["method"]: row for row in json.loads(numbers.read_text(encoding="utf-8"))["rows"]}
    assert rows.keys() == {"logits", "matrix", "split"}
    for row in rows.values():
        assert row["differences"] == pytest.approx([0, 0], abs=1e-5) and row["sent"] == 0
        assert row["ratio"] == row["seconds"][0] / rows["logits"]["seconds"][0]
    assert rows["split"]["peak_ratio"] < 0.7 < rows["logits"]["peak_ratio"]
    assert "sent by each" in capsys.readouterr().out
