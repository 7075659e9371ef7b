"""Roles are facts of use: source and target are looked up by words, the output makes logits, carriers do nothing."""

import pytest
import torch
from torch import nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    GPT2Config,
    IBertConfig,
    IBertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    MarianConfig,
    MarianForCausalLM,
    MarianMTModel,
    MobileBertConfig,
    MobileBertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_tying import TyingConfig, TyingError, assert_tied, tie, tying_report, untie
from hf_tying.ties.anatomy import Anatomy, roles
from hf_tying.training.schedules import freeze_role

from ..tiny import shared_names, tiny_model

# --- no lookup, no source --------------------------------------------------------------------------------------------


def whisper():
    return WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=100, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=16,
        max_target_positions=32, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        suppress_tokens=None, begin_suppress_tokens=None,
    ))  # fmt: skip


def test_a_convolution_over_sound_is_no_source():
    model = whisper()
    assert list(roles(model)) == ["target", "output"]
    freeze_role(model, None, "input")
    assert model.model.encoder.conv1.weight.requires_grad and not model.model.decoder.embed_tokens.weight.requires_grad
    with pytest.raises(TyingError, match="no source embedding"):
        tie(whisper(), "three_way")


# --- what is used is no carrier --------------------------------------------------------------------------------------


def blip():
    text = dict(
        vocab_size=99, hidden_size=16, encoder_hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, projection_dim=16, bos_token_id=1, eos_token_id=2,
        sep_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, tie_word_embeddings=False)
    return BlipForConditionalGeneration(config).eval()


BLIP_EMBED = "text_decoder.bert.embeddings.word_embeddings.weight"
BLIP_HEAD = "text_decoder.cls.predictions.decoder.weight"


def test_a_softmax_without_an_accessor_is_the_output():
    model = blip()
    assert {role: found.names for role, found in roles(model).items()} == {
        "target": (BLIP_EMBED,), "output": (BLIP_HEAD,)
    }  # fmt: skip
    head = model.get_parameter(BLIP_HEAD).detach().clone()
    tie(model, "none")
    assert torch.equal(model.get_parameter(BLIP_HEAD), head) and shared_names(model) == []
    with pytest.raises(TyingError, match="hold different values"):
        tie(model, "two_way")
    tie(model, "two_way", init_from="output")
    assert torch.equal(model.get_parameter(BLIP_EMBED), head)


def test_the_encoder_of_t5_uses_its_own_embedding_and_carries_shared():
    model = T5EncoderModel(T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    assert roles(model)["target"].name == "encoder.embed_tokens.weight"
    assert roles(model)["target"].carriers == ("shared.weight",)


@pytest.mark.parametrize("arch", ["bart", "t5", "marian"])
def test_shared_is_a_carrier_where_each_side_has_its_own_lookup(arch):
    found = roles(tiny_model(arch))
    assert [name.rpartition(".")[0].rpartition(".")[2] for name in found["source"].carriers] == ["shared"]
    assert found["source"].name != found["target"].name


class MTPLlama(LlamaForCausalLM):
    """A second head over the vocabulary, which the class ties too."""

    _tied_weights_keys = {
        "lm_head.weight": "model.embed_tokens.weight", "mtp_head.weight": "model.embed_tokens.weight"
    }  # fmt: skip

    def __init__(self, config):
        super().__init__(config)
        self.mtp_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def llama_config(**changes):
    return LlamaConfig(**dict(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, tie_word_embeddings=False,
    ) | changes)  # fmt: skip


def test_a_further_head_keeps_its_trained_values():
    model = MTPLlama(llama_config())
    values = model.mtp_head.weight.detach().clone()
    assert Anatomy(model).carriers == set()
    tie(model, "none")
    tie(model, "two_way", init_from="output")
    assert torch.equal(model.mtp_head.weight, values) and shared_names(model) == [
        ["model.embed_tokens.weight", "lm_head.weight"]
    ]


class WholeMTPLlama(LlamaForCausalLM):
    """The same, made in one `__init__`, as the stock loader needs it where the flag is on."""

    _tied_weights_keys = MTPLlama._tied_weights_keys

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = LlamaModel(config)
        self.lm_head, self.mtp_head = (nn.Linear(config.hidden_size, config.vocab_size, bias=False) for _ in range(2))
        self.post_init()


def test_a_scheme_on_a_stock_tied_model_leaves_a_further_head_where_it_is(tmp_path):
    model = WholeMTPLlama(llama_config(tie_word_embeddings=True))
    before = shared_names(model)
    assert before == [["model.embed_tokens.weight", "lm_head.weight", "mtp_head.weight"]]
    tie(model, "two_way")
    assert shared_names(model) == before
    model.resize_token_embeddings(103)
    assert shared_names(model) == before and model.mtp_head.out_features == 103
    model.save_pretrained(tmp_path)
    loaded = WholeMTPLlama.from_pretrained(tmp_path)
    assert_tied(loaded)
    assert shared_names(loaded) == before and torch.equal(loaded.mtp_head.weight, model.mtp_head.weight)
    assert shared_names(tie(loaded, "none")) == []


# --- one module in two roles -----------------------------------------------------------------------------------------


class OneModuleConfig(PreTrainedConfig):
    model_type = "one_module"
    vocab_size: int = 50
    width: int = 8
    tie_word_embeddings: bool = True


class OneModule(PreTrainedModel):
    """As MPT and OLMo: no head of its own when it is tied."""

    config_class = OneModuleConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.a, self.b = nn.Linear(config.width, config.width), nn.Linear(config.width, config.width)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def get_output_embeddings(self):
        return self.wte if self.lm_head is None else self.lm_head

    def forward(self, ids):
        hidden = torch.tanh(self.b(torch.tanh(self.a(self.wte(ids)))))
        return nn.functional.linear(hidden, self.get_output_embeddings().weight)


@pytest.mark.parametrize("act", [
    lambda model: model, lambda model: tie(model, "two_way"),
    lambda model: tie(model, ["a.weight", "b.weight"], init_from="mean"),
])  # fmt: skip
def test_a_class_without_a_head_when_it_is_tied_is_tied_two_way(act, tmp_path):
    model = act(OneModule(OneModuleConfig())).eval()
    assert_tied(model)
    assert tying_report(model).scheme == "two_way" and model.config.tie_word_embeddings is True
    model.save_pretrained(tmp_path)
    again, info = OneModule.from_pretrained(tmp_path, output_loading_info=True)
    ids = torch.arange(10)[None]
    assert not info["missing_keys"] and torch.equal(again.eval()(ids), model(ids))


@pytest.mark.parametrize("act", [untie, lambda model: tie(model, "none")])
def test_it_cannot_be_untied_and_the_error_says_why(act):
    model = OneModule(OneModuleConfig())
    with pytest.raises(TyingError, match="are one module, 'wte.weight'.*tie_word_embeddings=False"):
        act(model)
    assert type(model) is OneModule
    two = act(OneModule(OneModuleConfig(tie_word_embeddings=False)))  # the way out
    assert two.lm_head.weight is not two.wte.weight


# --- flags that a class sets itself, two sizes, part models ----------------------------------------------------------


@pytest.mark.parametrize("outer", [None, False, True])
def test_a_class_that_writes_the_flag_itself_loads_what_it_has_saved(outer, tmp_path):
    decoder = GPT2Config(
        vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=64, add_cross_attention=True,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    encoder = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    if outer is not None:
        config.tie_word_embeddings = outer
    model = tie(VisionEncoderDecoderModel(config), "two_way", init_from="output")
    model.save_pretrained(tmp_path)
    again = VisionEncoderDecoderModel.from_pretrained(tmp_path)
    assert_tied(again)
    assert torch.equal(again.decoder.lm_head.weight, model.decoder.lm_head.weight)
    assert len(shared_names(again)) == 1


def marian(**changes):
    return MarianConfig(**dict(
        vocab_size=100, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    ) | changes)  # fmt: skip


def test_the_decoder_of_a_family_with_two_sizes_lives_by_itself(tmp_path):
    model = tie(MarianForCausalLM(marian()), "two_way")
    model.save_pretrained(tmp_path / "alone")
    assert_tied(MarianForCausalLM.from_pretrained(tmp_path / "alone"))
    model.tie_weights()
    model.resize_token_embeddings(120)
    assert model.lm_head.weight.shape[0] == model.config.decoder_vocab_size == 120
    tie(MarianMTModel(marian()), "two_way").save_pretrained(tmp_path / "whole")
    assert_tied(MarianForCausalLM.from_pretrained(tmp_path / "whole"))


@pytest.mark.parametrize("held", [False, True])
def test_a_class_whose_resize_takes_one_argument_is_resized(held):
    model = MobileBertForMaskedLM(MobileBertConfig(
        vocab_size=100, hidden_size=16, embedding_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, true_hidden_size=16, intra_bottleneck_size=16, max_position_embeddings=32,
    )).eval()  # fmt: skip
    if held:
        tie(model, "two_way")
    ids = torch.arange(3, 15)[None]
    before = model(input_ids=ids).logits
    model.resize_token_embeddings(110)
    after = model(input_ids=ids).logits
    assert after.shape[-1] == 110 and torch.allclose(after[..., :100], before, atol=1e-5)
    assert model.cls.predictions.decoder.weight is model.mobilebert.embeddings.word_embeddings.weight
    with pytest.raises(TypeError, match="pad_to_multiple_of"):
        model.resize_token_embeddings(111, pad_to_multiple_of=8)


def test_a_matrix_is_quantised_by_what_it_is_and_not_by_the_name_of_its_file():
    """I-BERT keeps its modules in a file called `quant_modules`; without `quant_mode` they are float32."""
    model = IBertForMaskedLM(IBertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, tie_word_embeddings=False,
    ))  # fmt: skip
    layers = [f"ibert.encoder.layer.0.attention.self.{name}.weight" for name in ("query", "key")]
    tie(tie(model, "two_way", init_from="target"), layers, init_from="mean")
    assert_tied(model)
    assert layers in shared_names(model) and any("word_embeddings" in names[0] for names in shared_names(model))


class HeadOfItsOwnDtype(LlamaForCausalLM):
    """As HY-V4: the class makes its head in another dtype than the embedding that it ties it to."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=torch.float64)
        self.post_init()


@pytest.mark.parametrize("entry", [None, {"version": 1}, {"version": 1, "scheme": "two_way"}])
def test_names_that_a_class_ties_by_itself_may_differ_in_dtype(entry, tmp_path):
    model = HeadOfItsOwnDtype(llama_config(tie_word_embeddings=True, tying=entry))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.float32
    assert_tied(model)
    tie(model, "two_way").save_pretrained(tmp_path)
    assert_tied(HeadOfItsOwnDtype.from_pretrained(tmp_path))


def test_and_others_may_not():
    model = LlamaForCausalLM(llama_config(num_hidden_layers=2))
    model.model.layers[1].to(torch.float64)
    with pytest.raises(TyingError, match="shape and dtype"):
        tie(model, [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)], init_from="mean")


@pytest.mark.parametrize("how", ["tie", "config"])
def test_a_head_over_the_first_rows_only_is_refused_with_both_shapes(how):
    model = LlamaForCausalLM(llama_config())
    model.lm_head = nn.Linear(16, 90, bias=False)
    with pytest.raises(TyingError, match=r"\(100, 16\).*\(90, 16\)"):
        tie(model, "two_way" if how == "tie" else TyingConfig("two_way"), init_from="target")
    assert type(model) is LlamaForCausalLM
