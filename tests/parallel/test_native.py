"""Models that transformers splits (tensor parallelism, FSDP2, a pipeline), with a declared tie and a tied loss."""

import re

import pytest

from ..engines import BY_BLOCKS
from ..processes import run_script

pytestmark = pytest.mark.timeout(300)
KINDS = ("llama two_way", "llama layers", "llama tied loss")


@pytest.fixture(scope="module")
def results() -> dict:
    return run_script("engines_native.py", processes=2)


@pytest.mark.parametrize(
    "case", [f"{way}, {kind}" for way in ("tp", "fsdp") for kind in KINDS] + ["tp, llama untied, tied loss"]
)
def test_a_split_model_trains_as_one_process_does_and_is_read_by_one(results, case):
    found, kind = results[case], case.partition(", ")[2]
    assert found["split"] and (found["units"] > 2) == case.startswith("fsdp")
    assert max(found["gradient"], found["weights"]) < 1e-12 < 1e-4 < found["moved"]
    assert found["names"] == found["without gradient"] == []
    assert found["without logits"] == (kind in BY_BLOCKS)  # of a split vocabulary too
    assert found["reloaded"] == 0.0


def test_rows_that_transformers_cannot_cut_into_equal_parts_are_refused_until_they_are_padded(results):
    refused, padded = results["fsdp, not divided"]["found"]
    assert "the 129 rows of group 'embeddings' do not divide by 2 processes" in refused
    assert "resize_token_embeddings(pad_to_multiple_of=2)" in refused and padded < 1e-12


def test_an_objective_over_a_split_vocabulary_is_refused(results):
    assert re.search("is a DTensor .*use_tied_loss", results["tp, objective"]["error"])


def test_trls_log_probs_over_a_split_vocabulary_gather_no_logits(results):
    assert results["tp, fused"]["apart"] < 1e-12 and results["tp, fused"]["split"] == [True, False]


@pytest.mark.parametrize("kind", ["llama two_way", "llama layers"])
def test_a_pipeline_evaluates_as_one_process_and_is_not_trained(results, kind):
    found = results[f"pp, {kind}"]
    assert found["logits"] < 1e-12
    assert "Cannot train LlamaForCausalLM in pipeline stages" in found["error"]
