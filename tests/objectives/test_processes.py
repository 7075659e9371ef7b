"""`use_tied_loss` in two processes: DDP and FSDP2 reach what one process reaches with the stock loss."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results() -> dict:
    """All cases, in one launch of two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / "tests" / "scripts" / "two_processes_tied_loss.py")]  # fmt: skip
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-4000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULTS "))
    return json.loads(line.removeprefix("RESULTS "))


pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("case", ["ddp, before", "ddp, after", "fsdp2, before", "fsdp2, after"])
def test_two_processes_reach_by_blocks_what_one_reaches(results, case):
    found = results[case]
    assert found["drift"] < 1e-5 < 1e-3 < found["moved"]
    assert (found["blocks"], found["without logits"], found["told"]) == (3, True, [])
    assert found["enabled"]


def test_a_head_that_is_sharded_by_itself_has_the_stock_loss_and_the_log_tells_once(results):
    found = results["fsdp2, head apart"]
    assert found["drift"] < 1e-5 < 1e-3 < found["moved"]
    assert (found["blocks"], found["without logits"]) == (0, False)
    assert len(found["told"]) == 1 and "is a DTensor (sharded over processes" in found["told"][0]


def test_undone_the_model_is_sharded_as_before(results):
    assert results["fsdp2, undone"] == {"sharded": True, "enabled": False}
