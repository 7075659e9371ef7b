"""`examples/benchmarks/post_training.py`: one run at a small shape."""

import json
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


def test_a_run_writes_a_row_for_each_method(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    numbers = tmp_path / "numbers.json"
    flags = ["--quick", "--use_cpu", "--json", str(numbers)]
    monkeypatch.setattr(sys, "argv", ["post_training.py", *flags])
    runpy.run_path(str(FOLDER / "post_training.py"), run_name="__main__")
    rows = {(row["problem"], row["method"]): row for row in json.loads(numbers.read_text(encoding="utf-8"))["rows"]}
    assert {("log-probs", "naive"), ("log-probs", "tied")} <= rows.keys()
    assert {name for problem, name in rows if problem == "distillation"} == {"naive", "tied", "tied_top_k"}
    for problem in ("log-probs", "distillation"):
        naive, tied = rows[problem, "naive"], rows[problem, "tied"]
        assert (naive["matrices"], tied["matrices"]) == (3, 1)
        assert tied["ratio"] == tied["seconds"][0] / naive["seconds"][0]
        assert tied["differences"] == pytest.approx([0, 0], abs=1e-4) and naive["differences"] == [0, 0]
    assert "tied_top_k" in capsys.readouterr().out
