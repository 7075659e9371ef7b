"""`relaxed_sharing.py` and `fixed_point_theory.py` as a user runs them, for a few steps."""

import json

import pytest


def test_relaxed_sharing_has_numbers_between_the_exact_tie_and_free_filters(as_script, tmp_path):
    pytest.importorskip("matplotlib")
    flags = ["--steps", 2, "--seeds", 2, "--asymmetry", "0,0.5", "--output_dir", tmp_path]
    assert "gap of the relaxed tie" in as_script("papers/relaxed_sharing.py", *flags).stdout
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    first = {kind: runs[0] for kind, runs in results["0.5"].items()}
    assert first["exact tie"]["parameters"] < first["relaxed tie"]["parameters"] < first["free"]["parameters"]
    assert first["exact tie"]["gap"] == 0 < first["relaxed tie"]["gap"]
    assert (tmp_path / "relaxed_sharing.png").stat().st_size > 10_000


def test_the_line_through_the_losses_of_an_equilibrium_is_measured(as_script, tmp_path):
    pytest.importorskip("matplotlib")
    flags = ["--steps", 3, "--widths", 8, "--output_dir", tmp_path]
    done = as_script("papers/fixed_point_theory.py", *flags)
    assert "Gradient descent on 10 points" in done.stdout
    assert len(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]["8"]["loss"]) == 3
    factor, explained = done.names["line_through"]([2 * 0.9**step for step in range(20)])
    assert factor == pytest.approx(0.9) and explained == pytest.approx(1)
    assert done.names["line_through"]([1 / (1 + step) for step in range(20)])[1] < 0.95
