"""`examples/papers/act3d_stages.py` as a user runs it, with a tiny network."""

import json
import runpy
import sys
from pathlib import Path

from hf_tying import assert_tied, load_tied

SCRIPT = Path(__file__).parents[2] / "examples" / "papers" / "act3d_stages.py"


def test_tied_stages_have_a_third_of_the_parameters_and_are_loaded_again(monkeypatch, tmp_path, capsys):
    flags = ["--steps", "2", "--seeds", "2", "--batch", "2", "--width", "4", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script = runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "distance from the target" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(results["tied"]) == len(results["untied"]) == 2
    assert results["untied"][0]["parameters"] == 3 * results["tied"][0]["parameters"]
    network = load_tied(script["Stages"](4), tmp_path)
    assert_tied(network)
    assert network.stages[0].query.weight is network.stages[2].query.weight
