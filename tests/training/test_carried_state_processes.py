"""A carried state in two processes: each has its own columns, and both together reach what one process reaches."""

import pytest
import torch

from ..processes import run_script
from ..scripts.two_processes_carried_state import CASES


@pytest.mark.timeout(300)
def test_two_processes_reach_what_one_reaches():
    one = {case: trained() for case, trained in CASES.items()}
    two = run_script("two_processes_carried_state.py", processes=2, timeout=140)
    assert one.keys() == two.keys() and len(one) == 4
    for case, expected in one.items():
        found = two[case]
        assert (expected["processes"], found["processes"]) == (1, 2)
        assert len(found["seen"]) == len(expected["seen"]) > 0
        for mine, whole in zip(found["seen"], expected["seen"], strict=True):
            assert mine == whole[:2]  # the first two columns, in every batch
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(
                torch.tensor(found["weights"][name]), torch.tensor(weight), rtol=1e-4, atol=1e-5, msg=f"{case}: {name}"
            )
