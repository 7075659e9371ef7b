"""f06, f17, f18, f22: what a class or a config declares is tied, also where transformers misreads it, or refused."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
)

from hf_tying import TiedModelMixin, TyingError, assert_tied, tie, tying_report, untie

from ..forms import reload, tied_model
from ..tiny import logits, tiny_config, tiny_model

MLP = "transformer.h.{}.mlp.c_fc.weight"


def declared(keys, **config):
    """A class over the mixin that declares `keys` itself, in transformers' own attribute."""
    cls = type("Declared", (TiedModelMixin, GPT2LMHeadModel), {"_tied_weights_keys": keys})
    return cls(tiny_config("gpt2", n_layer=3, tie_word_embeddings=True, **config))


@pytest.mark.parametrize("keys", [
    {MLP.format(1): MLP.format(0), MLP.format(2): MLP.format(1)},
    {MLP.format(2): MLP.format(1), MLP.format(1): MLP.format(0)},
], ids=["in order", "reversed"])  # fmt: skip
def test_a_chain_is_one_group_in_either_order(keys, tmp_path):
    model = declared(keys)
    assert len({id(model.get_parameter(MLP.format(i))) for i in range(3)}) == 1
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_tied(loaded)
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_a_cycle_is_one_group():
    model = declared({MLP.format(0): MLP.format(1), MLP.format(1): MLP.format(0)})
    assert model.get_parameter(MLP.format(0)) is model.get_parameter(MLP.format(1))


def test_a_typo_is_refused_with_the_nearest_names():
    with pytest.raises(TyingError, match=r"does not exist.*nearest names are 'transformer.wte.weight'"):
        declared({"lm_head.weight": "transformer.wtee.weight"})


def test_a_literal_dollar_is_read_as_the_pattern_that_it_is_and_never_saved_as_a_name(tmp_path):
    model = declared({"lm_head.weight$": "transformer.wte.weight$"})
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    assert_tied(type(model).from_pretrained(tmp_path))


def test_a_shape_mismatch_is_refused():
    with pytest.raises(TyingError, match=r"\(16, 64\).*\(64, 16\)"):
        declared({"transformer.h.0.mlp.c_proj.weight": MLP.format(0)})


def test_the_list_form_of_transformers_4_is_refused_clearly():
    with pytest.raises(TyingError, match="is a list: expected a dict"):
        declared(["lm_head.weight"])


class WithBuffers(PreTrainedModel):
    config_class = GPT2Config
    _tied_weights_keys = {"second": "first"}

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("first", torch.zeros(3))
        self.register_buffer("second", torch.zeros(3))
        self.post_init()


def test_a_tie_of_buffers_is_refused_clearly():
    with pytest.raises(TyingError, match="is a buffer, not a parameter"):
        type("TiedWithBuffers", (TiedModelMixin, WithBuffers), {})(tiny_config("gpt2"))


class Listed(PreTrainedModel):
    """Models inside an `nn.ModuleList`, which transformers' own bookkeeping does not see."""

    config_class = GPT2Config
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.members = nn.ModuleList([GPT2LMHeadModel(config), GPT2LMHeadModel(config)])
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(std=0.02)

    def forward(self, input_ids, **kwargs):
        return sum(member(input_ids).logits for member in self.members)


class TiedListed(TiedModelMixin, Listed):
    pass


@pytest.mark.parametrize("make", [lambda c: tie(Listed(c), ["members.0.lm_head.weight", "members.1.lm_head.weight"],
                                                 init_from="members.0.lm_head.weight"), TiedListed],
                         ids=["in place", "class form"])  # fmt: skip
def test_ties_of_models_in_a_module_list_survive_the_file(make, tmp_path):
    model = make(tiny_config("gpt2")).eval()
    assert all(m.lm_head.weight is m.transformer.wte.weight for m in model.members)
    model.save_pretrained(tmp_path)
    loaded = (type(model) if type(model) is TiedListed else Listed).from_pretrained(tmp_path)
    assert_tied(loaded)
    ids = torch.arange(6)[None]
    assert torch.equal(loaded(ids), model(ids))


def test_a_legacy_override_of_tie_weights_gets_the_arguments_it_can_take():
    class Legacy(TiedModelMixin, GPT2LMHeadModel):
        def tie_weights(self, *args, **kwargs):
            super().tie_weights(*args, **kwargs)

    assert_tied(Legacy(tiny_config("gpt2")))


def test_tie_encoder_decoder_is_told_apart_from_what_is_tied():
    """f06: the flag is accepted, stored and ignored by transformers; the report says what is so."""
    report = tying_report(tiny_model("bart", tie_word_embeddings=False, tie_encoder_decoder=True))
    assert [group.actual for group in report.groups] == []


class TestEncoderDecoder:
    """f06: any encoder with any decoder, tied across the two; transformers refuses to save such a model."""

    @staticmethod
    def scores(model):
        ids = torch.arange(8)[None]
        with torch.no_grad():
            return model(input_ids=ids, decoder_input_ids=ids).logits

    @pytest.mark.parametrize("decoder", ["bert", "gpt2"])
    @pytest.mark.parametrize("scheme", ["two_way", "three_way", "source_target", "none"])
    def test_each_scheme_of_an_encoder_decoder_survives_the_file_with_and_without_the_entry(
        self, decoder, scheme, tmp_path
    ):
        config = EncoderDecoderConfig.from_encoder_decoder_configs(
            tiny_config("bert"), tiny_config(decoder, is_decoder=True, add_cross_attention=True)
        )
        model = EncoderDecoderModel(config).eval()
        tie(model, scheme, init_from="source" if scheme != "none" else None)
        assert_tied(model)
        model.save_pretrained(tmp_path)
        loaded = EncoderDecoderModel.from_pretrained(tmp_path)
        assert_tied(loaded)
        assert loaded.config.tying["scheme"] == scheme
        assert torch.equal(self.scores(loaded), self.scores(model))
        path = tmp_path / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "tying"}))
        stock = EncoderDecoderModel.from_pretrained(tmp_path)
        assert type(stock) is EncoderDecoderModel
        assert torch.equal(self.scores(stock), self.scores(model))


class TestT5:
    """f18: the T5 family forces its flag; it is untied all the same, and the logits keep their scale."""

    @pytest.mark.parametrize("scheme", ["none", "two_way", "source_target"])
    def test_t5_is_tied_by_schemes_that_its_config_cannot_express(self, scheme, tmp_path):
        model = tiny_model("t5")
        before = logits(model)
        tie(model, scheme)
        assert torch.equal(logits(model), before)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert_tied(loaded)
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.config.tying["scheme"] == scheme

    def test_untie_gives_each_role_of_t5_a_matrix_of_its_own(self):
        model = untie(tiny_model("t5"))
        assert (
            len({id(m.weight) for m in (model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head)}) == 3
        )


class TestTheClassOfATiedModel:
    """f22: a dynamic subclass under the stock name."""

    def test_a_tied_model_keeps_the_name_of_the_stock_class_and_is_an_instance_of_it(self, tmp_path):
        model = tied_model("in place")
        assert type(model).__name__ == "GPT2LMHeadModel" and isinstance(model, GPT2LMHeadModel)
        model.save_pretrained(tmp_path)
        assert AutoModelForCausalLM.from_pretrained(tmp_path).config.architectures == ["GPT2LMHeadModel"]

    def test_pickle_and_deepcopy_find_the_class_of_a_tied_model(self):
        model = tied_model("in place")
        for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert type(twin) is type(model)
            assert_tied(twin)

    def test_a_model_inside_that_shares_the_config_object_leaves_it_alone(self, tmp_path):
        config = GPT2Config(**tiny_config("gpt2").to_dict() | {"tying": {"version": 1, "scheme": "two_way"}})
        model = GPT2LMHeadModel(config)
        assert model.config.tying["groups"] == {"embeddings": ["transformer.wte.weight", "lm_head.weight"]}
        assert type(model.transformer) is GPT2Model


def test_a_base_model_inside_saves_its_own_part_of_a_tie(form, tmp_path):
    model = tied_model(form, spec={"mlp": [MLP.format(0), MLP.format(1)]}, init_from=MLP.format(0))
    model.base_model.save_pretrained(tmp_path)
    base = reload(model, tmp_path).base_model if form == "class form" else GPT2Model.from_pretrained(tmp_path)
    assert_tied(base)
    assert base.h[0].mlp.c_fc.weight is base.h[1].mlp.c_fc.weight
    assert model.config.tying["groups"]["mlp"] == [MLP.format(0), MLP.format(1)]
