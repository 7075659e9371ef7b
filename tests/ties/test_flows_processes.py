"""f16, f16b, f20: two processes. DDP and FSDP2 keep a tie, or the user is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def launch(script: str) -> dict:
    """All cases of a script in one launch of two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / "tests" / "scripts" / script)]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-4000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULTS "))
    return json.loads(line.removeprefix("RESULTS "))


@pytest.fixture(scope="module")
def results() -> dict:
    return launch("two_processes.py")


@pytest.fixture(scope="module")
def adapters() -> dict:
    return launch("two_processes_adapters.py")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", ["ddp, head", "ddp, layers", "ddp, bart untied", "fsdp2, head", "fsdp2, layers"])
def test_two_processes_reach_what_one_reaches(results, case):
    assert results[case]["drift"] < 1e-5


@pytest.mark.timeout(300)
def test_a_pair_sharded_in_two_groups_is_told(results):
    assert (
        results["fsdp2, pair torn apart"]["error"] and "lm_head.weight" in results["fsdp2, pair torn apart"]["error"]
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", ["ddp, TL6", "ddp, TL5, all", "fsdp2, TL6", "fsdp2, TL5, all"])
def test_two_processes_train_a_tied_lora_as_one_does(adapters, case):
    assert adapters[case]["drift"] < 1e-5
