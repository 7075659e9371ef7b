"""A vocabulary that is split over processes has the losses, log-probabilities and gradients of one process."""

import re

import pytest

from ..processes import run_script

pytestmark = pytest.mark.timeout(300)
CASES = [f"{w}, {b}, {r}" for w in (10, 7) for b in (True, False) for r in ("mean", "sum", "none")]
TOKENS = ["", ", 7 words without bias", ", capped", ", in tiles", ", no words for the last", ", equal logits",
          ", replicated", ", float32", ", all ignored"]  # fmt: skip


@pytest.fixture(scope="module", params=[2, 4])
def results(request) -> dict:
    return run_script("split_vocabulary.py", processes=request.param)


@pytest.mark.parametrize(
    "case", [*CASES, "smoothed", "scaled", "capped", "in tiles", "no words for the last", "all ignored"]
)
def test_loss_and_gradients_are_torchs(results, case):
    assert results[case]["loss"] < 1e-12 and results[case]["gradient"] < 1e-12


@pytest.mark.parametrize("case", TOKENS)
def test_outputs_and_gradients_of_each_token_are_those_of_one_process(results, case):
    found = results[f"tokens{case}"]
    limit = 1e-5 if case == ", float32" else 1e-12
    assert found["values"] < limit and found["gradient"] < limit
    assert 0 < found["top1"] < 1 or case in (", no words for the last", ", all ignored")


@pytest.mark.parametrize(
    "case, message",
    [
        ("other labels", "different tokens: expected .*full_tensor"),
        ("other tokens", "different tokens: expected .*full_tensor"),
        ("trained whole bias", "a bias that is trained whole .*distribute_tensor"),
        ("split hidden", r"hidden too, as .*redistribute\(placements=\[Replicate"),
        ("scale", "a learned logit_scale beside a bias"),
        ("transform", "no transform .* knows of"),
    ],
)
def test_what_cannot_be_split_is_refused(results, case, message):
    assert re.search(message, results["refusals"][case])
