"""f06, f17 to f19, f25: other architectures, declarations that are wrong, and embeddings that others lose."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, EncoderDecoderConfig, EncoderDecoderModel, PreTrainedModel

from hf_tying import TyingError, assert_tied, gap, share_layers, tie, tying_report

from ..engines import different
from ..tiny import logits, tiny_config, tiny_inputs, tiny_model
from .kinds import KINDS, LENGTHS, LOW_RANK, PAIRS, RELAXED, plain, shared


def values(model):
    return dict(model.named_parameters(remove_duplicate=False))


def is_the_same(loaded, model):
    """Values, ties, differences and the record."""
    assert_tied(loaded)
    found, expected = values(loaded), values(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert len([*loaded.parameters()]) == len([*model.parameters()]) and gap(loaded) == gap(model)
    assert loaded.config.tying == model.config.tying


class TestEncoderDecoders:
    """f06, f18, f19, f25."""

    @pytest.mark.parametrize(
        ("decoder", "scheme", "save_format"),
        [("bert", "two_way", "dedup"), ("gpt2", "three_way", "portable"), ("gpt2", "none", "dedup")],
    )
    def test_any_encoder_with_any_decoder_beside_each_scheme(self, decoder, scheme, save_format, tmp_path):
        """f06."""
        sizes = LENGTHS.get(decoder, {"num_hidden_layers": 4})
        config = EncoderDecoderConfig.from_encoder_decoder_configs(
            tiny_config("bert", num_hidden_layers=4),
            tiny_config(decoder, is_decoder=True, add_cross_attention=True, **sizes),
        )
        model = tie(EncoderDecoderModel(config), scheme, init_from=None if scheme == "none" else "source")
        shared(model, save_format, relax=LOW_RANK)
        model.save_pretrained(tmp_path)
        is_the_same(EncoderDecoderModel.from_pretrained(tmp_path), model)

    def test_encoder_and_decoder_stay_two_whatever_tie_encoder_decoder_says(self):
        """f06."""
        model = shared(plain("bart", tie_encoder_decoder=True), stack="encoder")
        assert [stack["path"] for stack in model.config.tying["depth"]] == ["model.encoder.layers"]
        names = [name for group in tying_report(model).groups for name in group.names]
        assert any("encoder.layers" in name for name in names) and not any("decoder.layers" in name for name in names)

    @pytest.mark.parametrize("kind", RELAXED)
    def test_a_t5_that_is_untied_beside_it_keeps_the_scale_of_its_logits(self, kind, tmp_path):
        """f18."""
        stock = plain("t5")
        model = tie(plain("t5"), "none")
        assert torch.equal(logits(model), logits(stock))
        KINDS[kind](model)
        model.save_pretrained(tmp_path)
        loaded = type(stock).from_pretrained(tmp_path)
        is_the_same(loaded, model)
        assert torch.equal(logits(loaded), logits(model))

    def test_a_member_that_the_class_ties_stays_exact_beside_a_relaxed_head(self, tmp_path):
        """f18: T5 ties encoder and decoder to `shared` by itself, and this group relaxes the head alone."""
        model = KINDS["relaxed pair"](tiny_model("t5"))
        assert list(gap(model)["pair"]) == ["lm_head.weight"]
        assert model.decoder.embed_tokens.weight is model.shared.weight
        model.save_pretrained(tmp_path)
        is_the_same(type(model).from_pretrained(tmp_path), model)

    @pytest.mark.parametrize("kind", RELAXED)
    def test_both_embeddings_of_bart_are_one_and_the_softmax_is_free(self, kind, tmp_path):
        """f19."""
        model = plain("bart")
        if kind != "relaxed pair":
            tie(model, "source_target", init_from="source")
        KINDS[kind](model)
        assert model.config.tying["scheme"] == "source_target"
        assert not torch.equal(model.lm_head.weight, model.model.encoder.embed_tokens.weight)
        model.save_pretrained(tmp_path)
        is_the_same(type(model).from_pretrained(tmp_path), model)

    @pytest.mark.parametrize(("kind", "count"), [("shared layers, relaxed", 80), ("relaxed pair", 50)])
    def test_every_trained_row_of_an_untied_bart_survives_a_resize(self, kind, count, tmp_path):
        """f25."""
        model = KINDS[kind](plain("bart"))
        names = ["lm_head.weight", *PAIRS["bart"]]
        before = {name: values(model)[name].detach().clone() for name in names}
        model.resize_token_embeddings(count)
        assert_tied(model)
        for name, rows in before.items():
            assert torch.equal(values(model)[name][: min(count, 64)], rows[:count]), name
        model.save_pretrained(tmp_path)
        is_the_same(type(model).from_pretrained(tmp_path), model)

    @pytest.mark.parametrize("kind", KINDS)
    def test_an_untied_bart_trains_all_that_it_has(self, kind):
        """f23: DDP waits for a gradient of each parameter."""
        model = KINDS[kind](tie(plain("bart"), "none")).train()
        model(**tiny_inputs(model)).loss.backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


#: What is wrong, and what the error names.
WRONG = {
    "a path with a typo": ({"depth": [{"path": "model.layer", "order": [0, 1, 0, 1]}]}, "'model.layer'"),
    "too few layers": ({"depth": [{"path": "model.layers", "order": [0, 1, 0]}]}, "the 3 layers"),
    "a factor of no layer": (
        {"depth": [{"path": "model.layers", "order": [0, 1, 0, 1], "damped": [4]}]},
        "from 0 to 3",
    ),
    "a private name with a typo": (
        {"depth": [{"path": "model.layers", "order": [0, 1, 0, 1], "private": ["input_layernrom.weight"]}]},
        "nearest names are 'input_layernorm.weight'",
    ),
    "a member with a typo": (
        {"groups": {"pair": {"names": [PAIRS["llama"][0], "lm_haed.weight"], "relax": LOW_RANK}}},
        "nearest names are 'lm_head.weight'",
    ),
    "an exact name that is no member": (
        {"groups": {"pair": {"names": [*PAIRS["llama"]], "relax": {**LOW_RANK, "exact": ["lm_haed.weight"]}}}},
        "lm_haed.weight",
    ),
    "other shapes": (
        {"groups": {"g": {"names": [PAIRS["llama"][0], "model.layers.0.mlp.up_proj.weight"], "relax": LOW_RANK}}},
        "shape",
    ),
    "a chain": (
        {"groups": {
            "a": {"names": ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"],
                  "relax": LOW_RANK},
            "b": {"names": ["model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"],
                  "relax": LOW_RANK},
        }},
        "Merge the groups",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_declaration_is_refused_at_once(case):
    """f17."""
    entry, message = WRONG[case]
    config = tiny_config("llama", num_hidden_layers=4, tie_word_embeddings=False)
    config.tying = {"version": 2, **entry}
    with pytest.raises(TyingError, match=message):
        AutoModelForCausalLM.from_config(config)


def test_an_order_may_number_its_blocks_as_it_likes():
    """f17."""
    model = share_layers(plain(), order=[3, 1, 3, 1])
    assert model.model.layers[2].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight


class Listed(PreTrainedModel):
    """Models inside an `nn.ModuleList`, which transformers' own bookkeeping does not see."""

    config_class = type(tiny_config("llama"))
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.members = nn.ModuleList([AutoModelForCausalLM.from_config(config) for _ in range(2)])
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(std=0.02)

    def forward(self, input_ids, **kwargs):
        return sum(member(input_ids).logits for member in self.members)


@pytest.mark.parametrize("relax", [None, LOW_RANK], ids=["exact", "relaxed"])
@pytest.mark.parametrize("stack", ["members", "members.1.model.layers"])
def test_layers_of_models_in_a_module_list_survive_the_file(relax, stack, tmp_path):
    """f17."""
    model = Listed(tiny_config("llama", num_hidden_layers=2, tie_word_embeddings=False))
    different(share_layers(model, "all", stack=stack, relax=relax))
    assert_tied(model)
    model.save_pretrained(tmp_path)
    is_the_same(Listed.from_pretrained(tmp_path), model)
