"""A vocabulary that is split over processes has torch's cross entropy and its gradients."""

import pytest

from ..processes import run_script

pytestmark = pytest.mark.timeout(300)
CASES = [f"{w}, {b}, {r}" for w in (10, 7) for b in (True, False) for r in ("mean", "sum", "none")]


@pytest.fixture(scope="module", params=[2, 4])
def results(request) -> dict:
    return run_script("split_vocabulary.py", processes=request.param)


@pytest.mark.parametrize(
    "case", [*CASES, "smoothed", "scaled", "capped", "in chunks", "no words for the last", "all ignored"]
)
def test_loss_and_gradients_are_torchs(results, case):
    assert results[case]["loss"] < 1e-12 and results[case]["gradient"] < 1e-12
