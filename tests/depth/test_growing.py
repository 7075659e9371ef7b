"""A model gets deeper: further visits of trained layers, which start as the identity."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    SwinConfig,
    SwinForImageClassification,
    XLNetConfig,
    XLNetLMHeadModel,
)

from hf_tying import (
    TyingError,
    assert_tied,
    share_layers,
    unroll,
    use_projection,
)
from hf_tying.depth.stacks import chosen_stacks
from tests.tiny import logits, tiny_inputs, tiny_model

from .models import plain


class TestGrowing:
    ORDER = [0, 1, 2, 1, 2, 3]

    def test_starts_as_the_model_that_it_was(self, tmp_path):
        stock = plain()
        model = share_layers(copy.deepcopy(stock), order=self.ORDER, grow=True)
        assert torch.equal(logits(model), logits(stock))
        assert model.config.num_hidden_layers == 6 and model.config.tying["depth"][0]["damped"] == [3, 4]
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6))
        for i in (3, 4):
            model.model.layers[i].visit_factor.data.fill_(0.5)
        model.save_pretrained(tmp_path)
        assert not (tmp_path / "model.safetensors").exists()  # stock would read another function
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_tied(loaded)
        assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(model), logits(stock))
        with pytest.raises(TyingError, match="visit_factor"):
            unroll(model)

    @pytest.mark.parametrize(
        ("name", "stack", "sizes"),
        [
            *(("t5", side, {"num_layers": 3}) for side in ("encoder", "decoder")),
            *(("bart", side, {"encoder_layers": 3, "decoder_layers": 3}) for side in ("encoder", "decoder")),
            ("llava", "model.language_model.layers", {}),
            *((name, None, {"num_hidden_layers": 3}) for name in ("bert", "modernbert", "mamba", "mixtral")),
            ("gpt2", None, {"n_layer": 3}),
        ],
        ids=str,
    )
    def test_one_stack_alone_grows_and_is_read_again(self, name, stack, sizes, tmp_path):
        """Of two stacks with the same number of layers, and with a second model from the same config."""
        stock = tiny_model(name, **sizes)
        model = copy.deepcopy(stock)
        other = type(stock)(model.config)
        size = len(next(iter(chosen_stacks(model, stack).values())))
        share_layers(model, order=[*range(size), size - 1], grow=True, stack=stack)
        assert torch.equal(logits(model), logits(stock))
        assert other.config.to_dict() == stock.config.to_dict()
        model.save_pretrained(tmp_path)
        loaded = type(stock).from_pretrained(tmp_path, ignore_mismatched_sizes=False)
        assert_tied(loaded)
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.state_dict().keys() == model.state_dict().keys()

    def test_one_stack_grows_after_the_other_and_beside_a_projection(self, tmp_path):
        model = use_projection(tiny_model("bart", encoder_layers=2, decoder_layers=2))
        before = logits(model)
        share_layers(model, order=[0, 1, 1], grow=True, stack="encoder")
        share_layers(model, order=[0, 0, 1, 1], grow=True, stack="decoder")
        assert (model.config.encoder_layers, model.config.decoder_layers) == (3, 4)
        assert torch.equal(logits(model), before)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), before)

    @pytest.mark.parametrize(
        ("name", "stack", "sizes"), [("t5", "encoder", {"num_layers": 3}), ("modernbert", None, {})]
    )
    def test_a_layer_that_no_config_makes_is_refused(self, name, stack, sizes):
        """The first layer has a position bias, or no norm, and a second visit of it would not be read from a file."""
        model = tiny_model(name, **sizes)
        before, keys = model.config.to_dict(), model.state_dict().keys()
        size = len(next(iter(chosen_stacks(model, stack).values())))
        with pytest.raises(TyingError, match="Cannot grow .*Leave out the layer"):
            share_layers(model, order=[0, *range(size)], grow=True, stack=stack)
        assert model.config.to_dict() == before and model.state_dict().keys() == keys

    def test_a_stage_that_the_config_would_make_wider_is_refused(self):
        model = SwinForImageClassification(
            SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
        )
        with pytest.raises(TyingError, match="Cannot grow 'swin.encoder.layers'"):
            share_layers(model, order=[0, 0, 1], grow=True)
        assert model.config.depths == [1, 1]

    def test_each_visit_has_its_place_in_the_cache_under_any_name(self):
        config = GPTNeoConfig(
            vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
            intermediate_size=32, max_position_embeddings=64,
        )  # fmt: skip
        model = share_layers(GPTNeoForCausalLM(config), order=[0, 1, 1], grow=True, stack="transformer.h")
        assert [layer.attn.attention.layer_id for layer in model.transformer.h] == [0, 1, 2]

    def test_layers_of_other_forms_start_as_the_identity(self):
        """OpenAI's GPT has layers that return lists."""
        model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16))
        ids = torch.randint(64, (2, 5))
        before = model.eval()(ids).logits
        assert torch.equal(share_layers(model, order=[0, 1, 1], grow=True).eval()(ids).logits, before)

    def test_layers_of_two_states_are_refused(self):
        """XLNet's second stream would not start as the identity."""
        model = XLNetLMHeadModel(XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=32))
        for further in ({"order": [0, 1, 1], "grow": True}, {"pattern": "all", "residual_factor": 0.5}):
            with pytest.raises(TyingError, match="two states, output_h and output_g"):
                share_layers(model, **further)
        assert len(model.transformer.layer) == 2

    def test_the_factor_learns(self):
        model = share_layers(plain(), order=self.ORDER, grow=True)
        model(**tiny_inputs(model)).loss.backward()
        assert model.model.layers[3].visit_factor.grad.abs() > 0

    def test_lists_of_the_config_follow(self):
        model = plain("gemma3_text", layer_types=["sliding_attention", "full_attention"] * 2)
        share_layers(model, order=[0, 1, 2, 3, 2, 3], grow=True)
        assert model.config.layer_types == ["sliding_attention", "full_attention"] * 3

    def test_generation_with_a_cache_is_that_without(self):
        model = share_layers(plain(), order=self.ORDER, grow=True)
        for i in (3, 4):
            model.model.layers[i].visit_factor.data.fill_(1.0)
        ids = torch.tensor([[3, 4, 5]])
        runs = [model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False)]
        assert torch.equal(*runs)
