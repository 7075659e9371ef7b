"""`examples/benchmarks/tied_softmax.py`: one run at a tiny shape, and what it says of methods without a figure."""

import json
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import median

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
SHAPE = "48,32,1000,float32"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield runpy.run_path(str(FOLDER / "tied_softmax.py"))


@pytest.fixture(scope="module")
def run(script, tmp_path_factory) -> tuple[dict, str]:
    """What a run writes and prints. `cce` stands for what needs a GPU, or a library that is not installed."""
    numbers, picture = (tmp_path_factory.mktemp("benchmark") / name for name in ("a.json", "a.png"))
    flags = ["--shape", SHAPE, "--methods", "cce", "tied", "--quick", "--use_cpu"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(sys, "argv", ["tied_softmax.py", *flags, "--json", str(numbers), "--picture", str(picture)])
        script["main"]()
    assert picture.stat().st_size > 0
    return json.loads(numbers.read_text(encoding="utf-8")), printed.getvalue()


@pytest.fixture
def rows(run) -> dict[str, dict]:
    return {row["method"]: row for row in run[0]["rows"]}


def test_each_method_has_a_row_and_the_machine_is_named(run):
    report, printed = run
    assert [(row["problem"], row["method"]) for row in report["rows"]] == [
        (SHAPE, method) for method in ("naive", "cce", "tied", "floor")
    ]
    assert report["machine"]["device"] == "cpu" and report["machine"]["threads"] >= 1
    assert SHAPE in printed and "tied" in printed


def test_naive_has_three_matrices_alive_and_tied_one(rows):
    assert (rows["naive"]["matrices"], rows["tied"]["matrices"]) == (3, 1)
    assert rows["tied"]["peak_bytes"] >= 1000 * 32 * 4
    assert rows["naive"]["peak_bytes"] >= 3 * 1000 * 32 * 4


def test_a_ratio_is_the_quotient_of_medians_of_the_same_round(rows):
    tied, naive = rows["tied"], rows["naive"]
    for own, base in zip(tied["rounds"], naive["rounds"], strict=True):
        assert own["ratio"] == own["median_seconds"] / base["median_seconds"]
    assert tied["ratio"] == median(own["ratio"] for own in tied["rounds"])
    assert tied["peak_ratio"] == tied["peak_bytes"] / naive["peak_bytes"]
    assert tied["to_floor"] == tied["median_seconds"] / rows["floor"]["median_seconds"]
    assert tied["gradient_error"] < 1e-5 and tied["loss_difference"] < 1e-5


def test_a_method_that_cannot_run_is_listed_with_its_reason(run, rows):
    assert rows["cce"]["failed"] and rows["cce"]["median_seconds"] is None
    assert f"cce does not run here: {rows['cce']['failed']}" in " ".join(run[1].split())


def test_a_process_over_the_limit_is_stopped(script):
    job = {"shape": [48, 32, 1000, "float32"], "method": "naive", "device": "cpu", "seed": 0, "steps": 1}
    result = script["run_worker"](job | {"limit": 0.05, "first_round": True})
    assert result == {"seconds": [], "cpu_seconds": [], "over_limit": True}


def test_a_ratio_to_a_method_that_did_not_finish_is_a_bound_and_decides_goals(script):
    shape = "1024,768,50257,bfloat16"
    slow = {"seconds": [], "cpu_seconds": [], "over_limit": True, "at_least_seconds": 100.0}
    tied = {"seconds": [9.0, 10.0, 11.0], "cpu_seconds": [9.0], "peak_bytes": 5}
    _, row = script["summary"]({shape: {"naive": {0: slow}, "tied": {0: tied, 1: tied}}})
    assert row["ratio"] is None and row["ratio_below"] == 0.1
    assert [met for _, met in row["goals"].values()] == ["met", "met", "not known"]


def test_wrong_shapes_and_methods_are_refused(script, monkeypatch):
    for flags, message in (
        (["--shape", "3,4,float32"], "no shape"),
        (["--shapes", "9"], "no shape"),
        (["--methods", "fastest"], "unknown method"),
        (["--json", "nowhere/rows.json"], "there is no folder 'nowhere'"),
        (["--picture", "nowhere/ratios.png"], "there is no folder 'nowhere'"),
        (["--picture", "ratios.png"], "--picture needs matplotlib, which is missing: pip install"),
    ):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        fails = lambda *arguments: pytest.fail("it measures before it refuses")  # noqa: E731
        monkeypatch.setitem(script["main"].__globals__, "measure", fails)
        monkeypatch.setattr(sys, "argv", ["tied_softmax.py", *flags])
        with pytest.raises(SystemExit, match=message):
            script["main"]()
