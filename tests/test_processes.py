"""The launcher of tests/processes.py: whatever a program does, it ends, wholly, and its output is told."""

import fcntl
import sys
import time

import pytest

from . import processes
from .processes import run_python, run_script

# It holds a lock, as does the process that it starts; both then do nothing for ten minutes.
HANGING = """
import fcntl, subprocess, sys, time
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
subprocess.Popen(["sleep", "600"], pass_fds=[lock.fileno()])
print("started", flush=True)
time.sleep(600)
"""


def is_free(path) -> bool:
    """Whether no living process holds the lock of `path`; those that were killed need a moment to be gone."""
    end = time.monotonic() + 60
    with open(path, "w") as lock:
        while time.monotonic() < end:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.05)
    return False


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A file for `run_script`, of the text given."""

    def write(text: str) -> str:
        (tmp_path / "script.py").write_text(text)
        return "script.py"

    monkeypatch.setattr(processes, "SCRIPTS", tmp_path)
    return write


def test_a_program_that_hangs_is_killed_in_time_with_all_that_it_started(tmp_path):
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"was killed after 3 s\nstarted"):
        run_python("-c", HANGING, tmp_path / "lock", timeout=3)
    assert is_free(tmp_path / "lock")
    assert time.monotonic() - start < 120  # of the ten minutes


def test_what_a_program_leaves_running_at_its_end_is_killed(tmp_path):
    run_python("-c", HANGING.replace("time.sleep(600)", ""), tmp_path / "lock")
    assert is_free(tmp_path / "lock")


def test_a_program_that_fails_is_an_error_with_its_output_unless_a_failure_is_expected():
    code = "import sys; print('so far'); sys.exit('no further')"
    with pytest.raises(AssertionError, match=r"ended with 1\nso far\n+no further"):
        run_python("-c", code)
    done = run_python("-c", code, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "so far\n", "no further\n")


def test_a_program_has_one_thread_the_tests_on_its_path_and_the_variables_given():
    code = "import os, tests; print(os.environ['OMP_NUM_THREADS'], os.environ.get('HOME'), os.environ['ONE_MORE'])"
    assert run_python("-c", code, environment={"HOME": None, "ONE_MORE": "x"}).stdout == "1 None x\n"


def test_the_processes_of_a_script_meet_and_the_results_are_those_of_the_first(script):
    name = script(
        "import torch, torch.distributed as dist\n"
        "from tests.processes import run_cases\n"
        "def case():\n"
        "    ranks = torch.full((), float(dist.get_rank()))\n"
        "    dist.all_reduce(ranks)\n"
        "    return {'rank': dist.get_rank(), 'sum': ranks.item(), 'threads': torch.get_num_threads()}\n"
        "run_cases({'one': case, 'two': dist.get_world_size})\n"
    )
    assert run_script(name, processes=2) == {"one": {"rank": 0, "sum": 1.0, "threads": 1}, "two": 2}


def test_one_process_has_no_group_and_runs_the_cases_that_are_named(script):
    name = script(
        "import torch.distributed as dist\n"
        "from tests.processes import run_cases\n"
        "run_cases({'grouped': dist.is_initialized, 'not asked for': lambda: 1 / 0})\n"
    )
    assert run_script(name, "grouped") == {"grouped": False}


def test_a_process_that_fails_ends_the_one_that_waits_for_it(script):
    code = "import os, time\nif os.environ['RANK'] == '1': raise ValueError('of the second')\ntime.sleep(600)"
    start = time.monotonic()
    with pytest.raises(AssertionError, match="script.py, process 1, ended with 1\n(?s:.*)ValueError: of the second"):
        run_script(script(code), processes=2)
    assert time.monotonic() - start < 120


def test_a_script_without_results_is_an_error(script):
    with pytest.raises(AssertionError, match="printed no line of results\nnothing"):
        run_script(script("print('nothing')"))


def test_the_last_line_of_results_counts(script):
    assert run_script(script('print(\'RESULTS {"a": 1}\\nRESULTS {"a": 2}\\nmore\')')) == {"a": 2}


def test_python_is_the_one_that_runs_the_tests():
    assert run_python("-c", "import sys; print(sys.executable)").stdout.strip() == sys.executable
