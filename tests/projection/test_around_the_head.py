"""Trainers and kernels that multiply by the softmax matrix themselves leave a projection out: such a step raises."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from hf_tying import TyingConfig, TyingError, merge_projection, tie, use_projection
from hf_tying.projection.head import ProjectedLinear
from hf_tying.ties.participation import Participation

from ..tiny import tiny_inputs, tiny_model

ARCHITECTURES = ["llama", "gpt2", "t5", "bart"]


def projected(arch: str = "llama"):
    model = use_projection(tiny_model(arch)).train()
    with torch.no_grad():
        model.get_output_embeddings().projection.weight.add_(0.1 * torch.randn(16, 16))
    return model


def around(model):
    """The loss as TRL's `add_fused_lm_head` and Liger's forwards compute it."""
    inputs = {name: value for name, value in tiny_inputs(model).items() if name != "labels"}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if model.base_model is model:  # T5
        memory = model.get_encoder()(input_ids=inputs["input_ids"])[0]
        hidden = model.get_decoder()(input_ids=inputs["input_ids"], encoder_hidden_states=memory)[0]
    else:
        hidden = model.base_model(**inputs)[0]
    return F.linear(hidden, model.get_output_embeddings().weight).logsumexp(-1).mean()


@pytest.mark.parametrize("arch", ARCHITECTURES)
class TestAStep:
    def test_around_the_head_is_as_before_without_a_projection(self, arch):
        model = tiny_model(arch).train()
        around(model).backward()
        assert model.get_output_embeddings().weight.grad.any()

    def test_around_the_head_raises_and_says_who_went(self, arch):
        model = projected(arch)
        with pytest.raises(
            TyingError, match=rf"projection.*took no part.*{__name__} computes the loss.*merge_projection"
        ):
            around(model).backward()

    def test_by_the_models_own_forward_is_as_before(self, arch):
        model = projected(arch)
        for _ in range(2):
            model(**tiny_inputs(model)).loss.backward()
        assert model.get_output_embeddings().projection.weight.grad.any()

    def test_around_the_head_after_the_merge_is_as_before(self, arch):
        model = merge_projection(projected(arch))
        around(model).backward()
        assert not any(isinstance(hook, Participation) for m in model.modules() for hook in m._forward_hooks.values())


class TestWhoWatches:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_copy_is_watched_too(self, copied):
        model = copied(projected())
        model(**tiny_inputs(model)).loss.backward()
        with pytest.raises(TyingError, match="took no part"):
            around(model).backward()
        around(merge_projection(model)).backward()

    def test_hooks_of_the_user_stay_when_nothing_is_watched_any_more(self):
        model, calls = projected(), []
        model.base_model.register_forward_hook(lambda *_: calls.append(1))
        around(merge_projection(model)).backward()
        assert calls == [1]

    def test_a_model_that_a_config_makes_is_watched_once(self, tmp_path):
        projected().save_pretrained(tmp_path)
        model = type(tiny_model("llama")).from_pretrained(tmp_path).train()
        assert isinstance(model.get_output_embeddings(), ProjectedLinear)
        tie(model, TyingConfig("two_way"), init_from="target")
        assert len(model.base_model._forward_hooks) == 1
        with pytest.raises(TyingError, match="took no part"):
            around(model).backward()

    def test_a_head_that_is_replaced_is_watched(self):
        model = projected()
        model.resize_token_embeddings(70)
        head = torch.nn.Linear(16, 70, bias=False)
        model.set_output_embeddings(head)
        model(**tiny_inputs(model)).loss.backward()
        with pytest.raises(TyingError, match="took no part"):
            around(model).backward()

    @pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
    def test_under_an_adapter_too(self, settings):
        base = projected()
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], **settings)).train()
        model.enable_input_require_grads()
        model(**tiny_inputs(base)).loss.backward()
        with pytest.raises(TyingError, match="took no part"):
            around(base).backward()

    @pytest.mark.parametrize("quiet", ["evaluation", "no gradient"])
    def test_only_training_steps_are_watched(self, quiet):
        model = projected()
        if quiet == "evaluation":
            around(model.eval()).backward()
        else:
            with torch.no_grad():
                assert around(model).isfinite()


class TestTRL:
    """Its own head, as a version puts in by another name than the one that `hf_tying.hook` wraps."""

    def patched(self, model):
        utils = pytest.importorskip("trl.trainer.utils", reason="pip install hf-tying[trl]")
        utils.add_fused_lm_head.__wrapped__(model)
        return lambda: model(**tiny_inputs(model), fused_lm_head=True).log_probs.mean()

    def test_its_fused_head_raises_with_a_projection_and_works_without(self):
        assert self.patched(tiny_model("llama").train())().backward() is None
        step = self.patched(projected())
        with pytest.raises(TyingError, match="took no part.*trl.trainer.utils computes the loss"):
            step().backward()
        assert self.patched(merge_projection(projected()))().backward() is None
