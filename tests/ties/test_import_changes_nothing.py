"""Importing the package alone changes nothing of a stock model: a sample of `tests.upstream.import_alone`."""

import pytest

from ..upstream import import_alone
from ..upstream.import_alone import compare, digests

SAMPLE = [
    *("LlamaForCausalLM", "GPT2LMHeadModel", "MptForCausalLM", "BertForMaskedLM", "AlbertForMaskedLM"),
    *("T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel"),
    *("WhisperForConditionalGeneration", "LlavaForConditionalGeneration"),
]


def test_weights_outputs_losses_gradients_and_files_are_bit_for_bit_the_same():
    assert list(compare(SAMPLE)) == []


def test_each_model_is_looked_at_as_made_loaded_and_resized():
    found = digests("LlamaForCausalLM")
    assert not any("error" in key for key in found)
    for stage in ("made", "loaded", "resized"):
        for what in ("model.embed_tokens.weight", "output 0", "gradient of lm_head.weight", "file model.safetensors"):
            assert f"{stage}: {what}" in found
    assert digests("LlamaForCausalLM") == found


@pytest.mark.parametrize("changed", [{"made: a": "2", "made: b": "1"}, {"made: a": "1"}, None])
def test_a_bit_that_differs_is_found(monkeypatch, changed):
    stock = {"made: a": "1", "made: b": "1"}
    monkeypatch.setattr(import_alone, "_answers", lambda names, imported: {"X": changed if imported else stock})
    [(name, what)] = compare(["X"])
    assert name == "X" and "differ" in what
