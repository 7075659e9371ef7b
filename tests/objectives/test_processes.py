"""`use_tied_loss` in two processes: DDP and FSDP2 reach what one process reaches with the stock loss."""

import re

import pytest

from ..processes import run_script


@pytest.fixture(scope="module")
def results() -> dict:
    """All cases, in one launch of two processes."""
    return run_script("two_processes_tied_loss.py", processes=2)


pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("case", ["ddp, before", "ddp, after", "fsdp2, before", "fsdp2, after"])
def test_two_processes_reach_by_blocks_what_one_reaches(results, case):
    found = results[case]
    assert found["drift"] < 1e-5 < 1e-3 < found["moved"]
    assert (found["blocks"], found["without logits"], found["told"]) == (3, True, [])
    assert found["enabled"]


def test_a_head_that_is_a_unit_of_its_own_stays_whole_until_its_loss(results):
    found = results["fsdp2, head apart"]
    assert found["drift"] < 1e-5 < 1e-3 < found["moved"]
    assert (found["blocks"], found["without logits"], found["told"]) == (3, True, [])


def test_undone_the_model_is_sharded_as_before(results):
    assert results["fsdp2, undone"] == {"sharded": True, "enabled": False}


def test_what_would_be_unused_is_not_frozen_under_ddp_but_refused(results):
    found = results["ddp, an objective after"]
    assert re.search("cls.predictions.bias.*before the model is wrapped", found["error"])
    assert found["bias is trained"] and not found["enabled"]
    assert found["without logits"]  # of the model with nothing to freeze
