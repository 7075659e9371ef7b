"""The size of a training step, against what autograd saves."""

import pytest
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from hf_tying.training.memory import saved_activations
from hf_tying.training.size_estimate import estimate_size, without_values

WORDS, SEQUENCES, TOKENS = 2000, 2, 64
SIDES = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
LLAMA = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
MODELS = {
    "llama": (AutoModelForCausalLM, LLAMA | {"intermediate_size": 176}),
    "qwen2": (AutoModelForCausalLM, LLAMA | {"intermediate_size": 320}),
    "gpt2": (AutoModelForCausalLM, {"n_embd": 64, "n_layer": 4, "n_head": 2}),
    "tied_lstm": (AutoModelForCausalLM, {"embedding_size": 64, "hidden_size": 64}),
    "bart": (AutoModelForSeq2SeqLM, {"d_model": 64, **SIDES, **HEADS}),
    "t5": (AutoModelForSeq2SeqLM, {"d_model": 64, "num_layers": 2, "d_ff": 256, "num_heads": 2, "d_kv": 32}),
}


@pytest.mark.parametrize("model_type", MODELS)
def test_a_step_needs_about_what_is_said(model_type):
    auto, fields = MODELS[model_type]
    special = {"pad_token_id": 0, "decoder_start_token_id": 0} if auto is AutoModelForSeq2SeqLM else {}
    model = auto.from_config(AutoConfig.for_model(model_type, vocab_size=WORDS, **special, **fields)).train()
    ids = torch.randint(4, WORDS, (SEQUENCES, TOKENS))
    with saved_activations(model) as saved:
        logits = model(input_ids=ids, labels=ids).logits
    # The log-probabilities are among what is saved; not the logits, and the gradients of both.
    beside_weights = saved.bytes + 3 * logits.nbytes
    found = estimate_size(model, SEQUENCES, TOKENS)
    assert found.training_bytes - 4 * found.weight_bytes == pytest.approx(beside_weights, rel=0.3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_model_without_values_is_made_by_its_class_alone(dtype, monkeypatch):
    """`from_config` makes a model of no size under ZeRO-3, and fails on the `meta` device."""
    config = AutoConfig.for_model("llama", vocab_size=WORDS, dtype=dtype, tie_word_embeddings=True, **LLAMA)
    expected = AutoModelForCausalLM.from_config(config)
    monkeypatch.delattr(PreTrainedModel, "_from_config")
    model = without_values(MODEL_FOR_CAUSAL_LM_MAPPING, config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert estimate_size(model, 1, 8) == estimate_size(expected, 1, 8)
