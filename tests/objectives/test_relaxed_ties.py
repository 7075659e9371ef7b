"""A relaxed place gives its module another matrix than the shared one: a loss has that matrix, or is refused."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_tying import TyingConfig, TyingError, harden, merge_projection, tie, use_projection, use_tied_loss
from hf_tying.objectives import AugmentedObjective, ContrastiveObjective

from ..losses.helpers import error
from ..tiny import tiny_inputs, untied_model, without_dropout

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
every_place = pytest.mark.parametrize("place", [HEAD, EMBEDDING])
every_kind = pytest.mark.parametrize("kind", ["scale", "lora", "basis"])


def relaxed(place, kind="scale", model=None):
    root = EMBEDDING if place == HEAD else HEAD
    groups = {"words": {"names": [root, place], "relax": {"kind": kind}}}
    model = tie(untied_model("llama") if model is None else model, TyingConfig(groups=groups), init_from=root)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_relaxation" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return without_dropout(model)


def step(model):
    model.zero_grad()
    loss = model(**tiny_inputs(model)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_place
@every_kind
def test_a_tied_loss_is_that_of_the_whole_logits(place, kind):
    model = relaxed(place, kind)
    wanted, theirs = step(copy.deepcopy(model))
    found, ours = step(use_tied_loss(model))
    torch.testing.assert_close(found, wanted)
    assert ours.keys() == theirs.keys() and any("_relaxation" in name for name in ours)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


@every_place
@pytest.mark.parametrize("objective", [AugmentedObjective(), ContrastiveObjective()], ids=str)
def test_an_objective_is_refused_for_the_true_reason(place, objective):
    model = use_tied_loss(relaxed(place), objective=objective)
    with pytest.raises(TyingError, match=rf"'{place}' is relaxed.*use_tied_loss\(model\)"):
        step(model)
    assert step(use_tied_loss(model))[0].isfinite()  # the way out
    assert step(use_tied_loss(harden(model), objective=objective))[0].isfinite()


@pytest.mark.parametrize("training", [True, False])
def test_a_wide_head_is_refused_for_the_true_reason(training):
    model = use_tied_loss(relaxed(HEAD), head_dtype="float64").train(training)
    with pytest.raises(TyingError, match=rf"cannot be computed in torch.float64 \('{HEAD}' is relaxed"):
        model(**tiny_inputs(model))
    assert model(**tiny_inputs(use_tied_loss(model))).loss.isfinite()  # the way out
    model = use_tied_loss(relaxed(EMBEDDING), head_dtype="float64").train(training)
    with torch.no_grad():
        wanted = use_tied_loss(copy.deepcopy(model), False)(**tiny_inputs(model)).loss
    torch.testing.assert_close(model(**tiny_inputs(model)).loss.float(), wanted, rtol=1e-5, atol=0)


@every_place
def test_trls_log_probabilities_are_those_of_its_logits(place):
    utils = pytest.importorskip("trl.trainer.utils", reason="pip install hf-tying[trl]")
    model = relaxed(place)
    given = tiny_inputs(model)
    with torch.no_grad():
        logits = copy.deepcopy(model)(**given).logits[:, :-1]
    wanted = logits.log_softmax(-1).gather(-1, given["labels"][:, 1:, None])[..., 0]
    utils.add_fused_lm_head(use_tied_loss(model))
    found = model(**given, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, wanted)
    found.loss.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if "_relaxation" in name)


def test_a_float32_head_that_trl_asks_for_is_refused_and_the_way_out():
    utils = pytest.importorskip("trl.trainer.utils", reason="pip install hf-tying[trl]")
    for cast in (True, False):
        model = use_tied_loss(relaxed(HEAD))
        utils.add_fused_lm_head(model, cast_lm_head_to_fp32=cast)
        if cast:
            with pytest.raises(TyingError, match=f"'{HEAD}' is relaxed.*cast_lm_head_to_fp32=False"):
                model(**tiny_inputs(model), fused_lm_head=True)
        else:
            assert model(**tiny_inputs(model), fused_lm_head=True).loss.isfinite()


@every_place
@every_kind
class TestProjection:
    def made(self, place, kind, first):
        model = use_projection(untied_model("llama")) if first == "projection" else None
        model = relaxed(place, kind, model)
        if first == "relaxation":
            before = copy.deepcopy(model).eval()
            model = use_projection(model).eval()
            given = tiny_inputs(model)
            assert model(**given).logits.equal(before(**given).logits)
        with torch.no_grad():
            model.lm_head.projection.weight.add_(0.1 * torch.randn(16, 16))
        return model.eval()

    @pytest.mark.parametrize("first", ["projection", "relaxation"])
    def test_both_are_kept_in_a_file_and_merged(self, place, kind, first, tmp_path):
        model = self.made(place, kind, first)
        given = tiny_inputs(model)
        matrix, projection = model.lm_head.weight.detach(), model.lm_head.projection
        hidden = model.model(given["input_ids"]).last_hidden_state
        wanted = projection(hidden).double() @ matrix.double().T
        assert error(model(given["input_ids"]).logits, wanted) < 1e-6
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert again.config.tying == model.config.tying and "relax" in again.config.tying["groups"]["words"]
        assert error(again(given["input_ids"]).logits, wanted) < 1e-6
        merged = merge_projection(again)
        assert error(merged(given["input_ids"]).logits, wanted) < 1e-5
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert error(again(given["input_ids"]).logits, wanted) < 1e-5

    def test_a_resize_keeps_both(self, place, kind):
        model = self.made(place, kind, "relaxation")
        given = tiny_inputs(model)["input_ids"]
        wanted = model(given).logits
        model.resize_token_embeddings(70)
        torch.testing.assert_close(model(given).logits[..., :64], wanted)
        assert any("_relaxation" in name for name, _ in model.named_parameters())
