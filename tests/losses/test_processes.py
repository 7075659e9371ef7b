"""The tied softmax and its one gradient in two processes: DDP and FSDP2 train what one process trains."""

import pytest

from ..processes import run_script

DDP = ["ddp, two-way", "ddp, three-way", "ddp, gradients in buckets", "ddp, the losses of all tokens",
       "ddp, accumulated"]  # fmt: skip
FSDP2 = ["fsdp2, two-way", "fsdp2, three-way", "fsdp2, not sharded again", "fsdp2, the losses of all tokens"]


@pytest.fixture(scope="module")
def results() -> dict:
    return run_script("two_processes_softmax.py", processes=2)


def backward_passes(case: str) -> int:
    """Of one process in three steps."""
    return 6 if case.endswith("accumulated") else 3


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", DDP + FSDP2)
def test_two_processes_reach_what_one_reaches_in_plain_torch(results, case):
    assert results[case]["drift"] < 1e-5 < 0.1 < results[case]["moved"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", DDP + FSDP2)
def test_the_tied_softmax_and_the_one_gradient_are_taken_in_two_processes(results, case):
    """FSDP2 gives the whole matrix to the forward pass of its group: nothing falls back to the usual path."""
    passes = backward_passes(case)
    assert results[case]["tied softmax"] == passes
    assert results[case]["one gradient"] == passes * (2 if "three-way" in case else 1)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", DDP)
def test_ddp_reduces_each_parameter_once_a_step_and_its_hook_fires_once(results, case):
    """Accumulating, the pass that is not reduced has its hook too."""
    assert results[case]["reduced"] == 3 * results[case]["parameters"]
    assert results[case]["fired"] == backward_passes(case)
