"""The zoo itself: classes are found, built and watched; what is known of a few classes is what it says of them."""

import os

import pytest
import torch

from . import zoo
from .zoo_inputs import inputs
from .zoo_sweep import misread, row
from .zoo_use import used

#: What a sweep over transformers 5.23 reached, without timm, scipy and detectron2.
CLASSES, BUILT, RAN = 1298, 1260, 1195


def _used(name: str, **changes):
    model = zoo.build(name, **changes)
    return used(model, inputs(model))


def test_bart_uses_three_of_its_four_matrices():
    found = _used("BartForConditionalGeneration")
    assert found.lookups == {
        "model.encoder.embed_tokens.weight": {"input_ids"},
        "model.decoder.embed_tokens.weight": {"decoder_input_ids"},
    }
    assert found.products == {"lm_head.weight"}
    assert found.idle == {"model.shared.weight"}


def test_a_convolution_is_no_lookup_of_words():
    found = _used("WhisperForConditionalGeneration")
    assert found.lookups == {"model.decoder.embed_tokens.weight": {"decoder_input_ids"}}
    assert found.products == {"proj_out.weight"}


def test_the_lone_embedding_of_an_encoder_is_used_and_shared_is_idle():
    found = _used("T5EncoderModel")
    assert set(found.lookups) == {"encoder.embed_tokens.weight"}
    assert found.idle == {"shared.weight"}


def test_a_product_put_together_from_two_matrices_is_a_product_with_both():
    assert _used("MobileBertForMaskedLM").products == {
        "cls.predictions.decoder.weight",
        "cls.predictions.dense.weight",
    }


def test_watching_leaves_the_model_as_it_is():
    model = zoo.build("GPT2LMHeadModel")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    used(model, inputs(model))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_seed_gives_the_same_weights():
    one, two, other = (zoo.build("LlamaForCausalLM", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("flag", [True, False])
def test_the_flag_reaches_nested_configs(flag):
    model = zoo.build("LlavaForConditionalGeneration", tie_word_embeddings=flag)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is flag


def test_what_cannot_be_built_says_why():
    with pytest.raises(zoo.CannotBuild, match="EsmFold2Model: no config"):
        zoo.build("EsmFold2Model")


#: Where accessors alone once answered wrongly, and a few where they are right.
SAMPLE = (
    *("BartForConditionalGeneration", "BertForMaskedLM", "BlipForConditionalGeneration"),
    *("FSMTForConditionalGeneration", "Florence2ForConditionalGeneration", "GPT2LMHeadModel"),
    *("LlamaForCausalLM", "LlavaForConditionalGeneration"),
    *("LongT5EncoderModel", "LxmertForPreTraining", "MT5ForTokenClassification", "MarianForCausalLM", "MarianMTModel"),
    *("MoonshineForConditionalGeneration", "Pix2StructForConditionalGeneration", "ProphetNetForConditionalGeneration"),
    *("RagTokenForGeneration", "ShieldGemma2ForImageClassification", "SiglipForImageClassification", "T5EncoderModel"),
    *("UMT5EncoderModel", "WhisperForAudioClassification", "WhisperForConditionalGeneration"),
)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_role_is_what_a_forward_pass_uses_it_for(name):
    found = row(name)
    assert found["ran"] and misread(found) == []


@pytest.mark.skipif("ZOO" not in os.environ, reason="make test-upstream runs the whole zoo, which takes four minutes")
def test_roles_are_facts_in_the_whole_zoo_and_it_is_no_smaller_than_it_was():
    rows = [row(name) for name in zoo.classes()]
    assert {found["class"]: problems for found in rows if found["ran"] and (problems := misread(found))} == {}
    assert len(rows) >= CLASSES
    assert sum(found["built"] for found in rows) >= BUILT
    assert sum(found["ran"] for found in rows) >= RAN
