"""What one process has lost is raised on all of them, by its rank, within the step, and nobody waits for good."""

import re

import pytest

from hf_tying import TyingError, assert_tied, tie
from hf_tying.ties.across_ranks import from_every_rank, on_any_rank, raised_on_every_rank

from .. import split_models
from ..processes import run_script
from ..tiny import untied_model

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def results() -> dict:
    return run_script("two_processes_ranks.py", processes=2)


@pytest.mark.parametrize("case", ["lost", "in mid-run", "in mid-run, a stock class", "in mid-step", "before a save"])
def test_a_lost_tie_is_named_on_both_ranks(results, case):
    first, second = results[case]["errors"]
    assert first == second
    assert first.startswith("rank 1 of 2: ") and "rank 0 of 2" not in first
    assert "found two (equal so far)" in first and "'lm_head.weight'" in first


@pytest.mark.parametrize("case", ["in mid-run", "in mid-run, a stock class", "in mid-step", "untied in mid-run"])
def test_it_is_named_before_the_next_step(results, case):
    assert results[case]["step"] == 2


@pytest.mark.parametrize("case", ["untied alone", "untied in mid-run"])
def test_another_declaration_of_one_rank_is_named_on_both(results, case):
    first, second = results[case]["errors"]
    assert first == second and "found on rank 1 another one than on rank 0: groups=[], not [[" in first


def test_a_config_of_one_rank_that_declares_nothing_is_named(results):
    first, second = results["untied alone"]["config"]
    assert first == second and "scheme=None, not 'two_way'" in first and "groups=" not in first


def test_an_error_of_another_kind_keeps_nobody_waiting(results):
    told, own = results["foreign error"]["errors"]
    assert told == f"TyingError: rank 1 of 2: {own}" and own == "ValueError: not ours"


def test_before_a_save_nothing_is_written(results):
    assert results["before a save"]["written"] == []


def test_copies_with_other_values_are_named_until_they_are_made_one(results):
    found = results["drifted"]
    assert found["errors"][0] == found["errors"][1]
    assert "found 2: one on rank 0 and one on rank 1" in found["errors"][0]
    assert found["wrapped"] == [None, None]


def test_shards_are_compared_with_those_of_the_same_place(results):
    found = results["sharded"]
    assert found["shards"] == found["copies"] == [None, None]
    assert "one on rank 0 and one on rank 1" in found["drifted"][0] == found["drifted"][1]


def test_two_processes_seal_one_checkpoint_and_resume_from_it(results):
    found = results["saved"]
    assert found["last"] == "checkpoint-4" and found["steps"] == 4
    assert {"complete.json", "model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= set(found["files"])


def test_each_row_is_translated_once_where_two_processes_have_as_many_each(results):
    assert results["translated"] == {"labels": [10, 11, 12, 13, 14], "translations": 5}


@pytest.mark.parametrize(("form", "name"), split_models.PAIRS)
def test_a_split_model_does_what_a_whole_one_does_or_refuses_unchanged(results, form, name):
    found = results["split models"][f"{name}, {form}"]
    if split_models.refused(form, name):
        assert found["same on both"] and found["changed"] == 0.0
        assert re.search(split_models.REFUSED[form], found["error"])
    else:
        assert "error" not in found and found["apart"] < 1e-6


def test_one_process_alone_asks_nobody():
    model = tie(untied_model("llama"), "two_way", init_from="output")
    assert_tied(model, across_ranks=True)
    assert from_every_rank("x") == ["x"] and on_any_rank(True) and not on_any_rank(False)
    model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.detach().clone())
    with pytest.raises(TyingError, match="^LlamaForCausalLM is not tied as declared"):
        assert_tied(model, across_ranks=True)
    with pytest.raises(ValueError, match="^not ours$"), raised_on_every_rank():
        raise ValueError("not ours")
