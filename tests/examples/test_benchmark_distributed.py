"""`examples/benchmarks/distributed.py` and `kill_and_resume.py`: one small run of each, with forked processes."""

import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def written(as_script, tmp_path, monkeypatch):
    """What a benchmark writes with `--json`."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # it is for the programs, not for the tests
    numbers = tmp_path / "numbers.json"

    def run(script: str, *arguments) -> dict:
        done = as_script(Path("benchmarks", script), *arguments, "--json", numbers)
        assert done.returncode == 0
        return json.loads(numbers.read_text(encoding="utf-8")) | {"printed": done.stdout}

    return run


def test_a_tie_saves_the_bytes_that_the_plan_says(written):
    found = written("distributed.py", "--quick")
    rows = {(row["processes"], row["engine"], row["method"]): row for row in found["rows"]}
    assert len(rows) == 9 and all(len(row["seconds"]) == 1 for row in rows.values())
    matrix = 1000 * 32 * 4  # bytes
    for engine, ways in (("DDP", 1), ("FSDP2", 3)):  # gathered for each pass and scattered; the kept one once less
        untied, tied, by_blocks = (rows[2, engine, method] for method in ("untied", "tied", "tied loss"))
        for row in (untied, tied, by_blocks):
            assert row["counted_bytes"] == row["planned_bytes"] > 0
        assert untied["counted_bytes"] - tied["counted_bytes"] == ways * matrix
        assert untied["optimizer_bytes"] - tied["optimizer_bytes"] == 2 * matrix // (1 if engine == "DDP" else 2)
        assert by_blocks["peak_bytes"] < tied["peak_bytes"] < untied["peak_bytes"]
        assert tied["ratios"]["time"] == tied["seconds"][0] / untied["seconds"][0]
    assert rows[1, "one process", "tied"]["counted_bytes"] == 0
    paper = next(row for row in found["papers"] if (row["model"], row["gpus"]) == ("Gemma-3-1B", 64))
    assert paper["parameters"] == {"tied": 999_885_952, "untied": 999_885_952 + 262144 * 1152}
    assert paper["ddp_float32_sent"]["untied"] / 2**30 == pytest.approx(9.55, abs=0.005)
    assert "NLLB-200-distilled-600M" in found["printed"]


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(written):
    found = written("kill_and_resume.py", "--kills", 1, "--steps", 2)
    assert (found["kills"], found["resumed"], found["lost ties"]) == (1, 1, 0)
    assert found["largest difference of a loss"] == found["largest difference of a weight"] == 0.0
