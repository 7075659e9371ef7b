"""A carried state in two processes: each has its own columns, and both together reach what one process reaches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "scripts" / "two_processes_carried_state.py"


def results(folder, *launcher) -> dict:
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *launcher, str(SCRIPT), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(next(line for line in run.stdout.splitlines() if line.startswith("RESULTS "))[8:])


@pytest.mark.timeout(300)
def test_two_processes_reach_what_one_reaches(tmp_path):
    one = results(tmp_path)
    two = results(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert (one["processes"], two["processes"]) == (1, 2)
    for case, expected in one["cases"].items():
        found = two["cases"][case]
        assert len(found["seen"]) == len(expected["seen"]) > 0
        for mine, whole in zip(found["seen"], expected["seen"], strict=True):
            assert mine == whole[:2]  # the first two columns, in every batch
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(
                torch.tensor(found["weights"][name]), torch.tensor(weight), rtol=1e-4, atol=1e-5, msg=f"{case}: {name}"
            )
