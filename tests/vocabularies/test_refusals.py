"""What cannot be joined is refused by `join_vocabularies`, and leaves the model as it was."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM, EncoderDecoderConfig, EncoderDecoderModel, GenerationConfig, GPT2LMHeadModel
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from hf_tying import TyingError, tie, untie
from hf_tying.ties.anatomy import Anatomy
from hf_tying.vocabularies import join_vocabularies

from ..tiny_translation import VOCAB, part_config, shake, translation_model
from .models import logits, model_for
from .two_vocabularies import (
    BOS_FIRST,
    ENGLISH,
    GERMAN,
    PAD_FIRST,
    TARGET,
    byte_level,
    marian_tokenizer,
    tokenizers_for,
    wordpiece,
)


def state_of(model) -> tuple:
    return (
        {name: (tensor.shape, tensor.clone()) for name, tensor in model.state_dict().items() if not tensor.is_meta},
        model.config.to_dict(),
        getattr(model, "generation_config", None) and model.generation_config.to_dict(),
        {frozenset(names) for names in Anatomy(model).tied},
    )


def refused(model, source, target, match: str, **kwargs) -> None:
    """The error has this text, and nothing is changed."""
    before = state_of(model)
    with pytest.raises(TyingError, match=match):
        join_vocabularies(model, source, target, **kwargs)
    after = state_of(model)
    assert before[1:] == after[1:] and before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name][1], after[0][name][1]) for name in before[0])


def joined_model(encoder, decoder) -> EncoderDecoderModel:
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.pad_token_id, config.decoder_start_token_id, config.eos_token_id = 0, 1, 2
    return shake(EncoderDecoderModel(config))


@pytest.mark.parametrize("overlap, hint", [("words", "nearest names are 'word'"), (None, "None"), ("", "''")])
def test_an_unknown_rule_is_refused(overlap, hint):
    source, target = tokenizers_for("bart", target_rows=VOCAB)
    for second in (target, source):  # also where there is nothing to join
        refused(model_for("bart"), source, second, f"Unknown overlap rule.*{hint}", overlap=overlap)


@pytest.mark.parametrize("side", ["source", "target"])
def test_more_words_than_rows_are_refused(side):
    source, target = tokenizers_for("bert2gpt2", VOCAB + (side == "source"), TARGET + (side == "target"))
    refused(model_for("bert2gpt2"), source, target, f"The {side} tokenizer has .* words up to id .*resize the model")


def test_hidden_sizes_that_differ_are_refused():
    model = joined_model(part_config("bert", False, hidden_size=32), part_config("gpt2", True, TARGET, n_embd=16))
    refused(model, *tokenizers_for("bert2gpt2"), r"\(64, 32\).*\(80, 16\).*Expected one width")


@pytest.mark.parametrize("model_class, config", [(GPT2LMHeadModel, "gpt2"), (BertForMaskedLM, "bert")])
def test_a_model_without_two_sides_is_refused(model_class, config):
    model = model_class(part_config(config, False))
    refused(model, *tokenizers_for("bert2gpt2"), "has no source embedding: expected an encoder-decoder")


def test_one_matrix_for_two_vocabularies_is_refused_and_untied_it_is_joined():
    model = translation_model("bart")
    source, target = tokenizers_for("bart", target_rows=VOCAB)
    refused(model, source, target, "are one parameter: every row would stand for two words.*untie")
    before = copy.deepcopy(untie(model))
    model, tokenizer = join_vocabularies(model, source, target)
    torch.testing.assert_close(logits(model, tokenizer)[..., :VOCAB], logits(before))


def test_tokenizers_of_equal_vocabularies_change_nothing_and_that_is_said():
    model = translation_model("bart")
    source, _ = tokenizers_for("bart")
    before = state_of(model)
    with CaptureLogger(logging.get_logger("hf_tying.vocabularies.join")) as said:
        model, tokenizer = join_vocabularies(model, source, copy.deepcopy(source))
    assert "same vocabulary already (64 words): nothing is changed" in said.out
    assert tokenizer is source
    after = state_of(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(before[0][name][1], after[0][name][1]) for name in before[0])


def test_equal_vocabularies_over_matrices_of_unequal_rows_get_equal_rows():
    model = model_for("bert2gpt2")
    source = wordpiece(ENGLISH, VOCAB, PAD_FIRST)
    before = copy.deepcopy(model)
    model, tokenizer = join_vocabularies(model, source, copy.deepcopy(source))
    assert tokenizer.joint.source_only == []
    assert model.config.encoder.vocab_size == model.config.decoder.vocab_size == TARGET
    torch.testing.assert_close(logits(model, tokenizer), logits(before))


def test_what_has_no_values_is_refused():
    model = model_for("bert2gpt2").to("meta")
    refused(model, *tokenizers_for("bert2gpt2"), "on the meta device.*Load the weights first")


def test_a_quantised_matrix_is_refused():
    model = model_for("bert2gpt2")
    held = model.decoder.lm_head.weight
    model.decoder.lm_head.weight = nn.Parameter(held.detach().to(torch.int8), requires_grad=False)
    refused(model, *tokenizers_for("bert2gpt2"), "is quantised.*Join before quantising")


def test_an_adapted_model_is_refused():
    from peft import LoraConfig, get_peft_model

    model = model_for("bert2gpt2")
    get_peft_model(model, LoraConfig(target_modules=["query"], r=2))
    refused(model, *tokenizers_for("bert2gpt2"), "carries adapters.*before get_peft_model")


def test_what_is_no_model_or_no_tokenizer_is_refused():
    source, target = tokenizers_for("fsmt")
    with pytest.raises(TyingError, match="expected a transformers PreTrainedModel"):
        join_vocabularies(nn.Linear(2, 2), source, target)
    refused(model_for("fsmt"), source, "gpt2", "Expected a transformers tokenizer, found str")


def test_a_matrix_tied_to_what_is_no_vocabulary_is_refused():
    model = joined_model(part_config("bert", False), part_config("gpt2", True, TARGET, n_positions=TARGET))
    tie(model, ["decoder.transformer.wte.weight", "decoder.transformer.wpe.weight"], init_from="mean")
    refused(model, *tokenizers_for("bert2gpt2"), r"wpe.weight' is tied to .* not a vocabulary matrix. untie\(model")


def test_positions_counted_from_a_padding_id_that_moves_are_refused():
    special = ["<s>", "[PAD]", "</s>", "<unk>"]
    source = wordpiece(ENGLISH, VOCAB, special)
    model = joined_model(part_config("roberta", False, pad_token_id=1), part_config("gpt2", True, TARGET))
    refused(model, source, tokenizers_for("bert2gpt2")[1], "counts positions from the padding id.*it is 1.*become 0")
    target = byte_level(GERMAN, TARGET, BOS_FIRST, alphabet=False)
    before = copy.deepcopy(model)
    model, tokenizer = join_vocabularies(model, source, target)
    assert tokenizer.pad_token_id == 1
    torch.testing.assert_close(logits(model, tokenizer)[..., :TARGET], logits(before))


def test_padding_tokens_that_cannot_be_one_are_refused_where_a_config_has_one_id():
    source = wordpiece(ENGLISH, VOCAB, ["<s>", "[PAD]", "</s>", "<unk>"])
    target = byte_level(GERMAN, TARGET, ["<s>", "<x>", "</s>", "<unk>"], alphabet=False)
    target.pad_token = "</s>"
    match = "MarianConfig has one padding id for both sides, 1: .* which is not the target's padding token '</s>'"
    refused(model_for("marian_separate"), source, target, match)


def test_a_model_that_nothing_can_keep_from_the_sources_words_is_refused():
    model = model_for("fsmt")
    model.generation_config = None
    refused(model, *tokenizers_for("fsmt"), "no output bias and no generation_config")
    model.generation_config = GenerationConfig()
    model, tokenizer = join_vocabularies(model, *tokenizers_for("fsmt"))
    assert model.generation_config.suppress_tokens[0] == TARGET


def test_a_tokenizer_that_ends_both_sides_with_one_of_two_ids_is_refused(tmp_path):
    pytest.importorskip("sentencepiece", reason="MarianTokenizer needs it: pip install sentencepiece")
    tokenizer = marian_tokenizer(tmp_path)
    words = tokenizer.target_encoder
    words["</s>"], words["▁d"] = words["▁d"], words["</s>"]
    model = translation_model("marian_separate", TARGET)
    refused(model, tokenizer, None, "ends the text of both sides with id 0, but its target vocabulary has .* at ")
