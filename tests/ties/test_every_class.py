"""A sample of the sweep over every class (`python -m tests.upstream.sweep`): a held model's life beside stock's."""

import logging

import pytest

from hf_tying import TiedModelMixin

from ..upstream import examine as examining
from ..upstream.examine import examine
from ..upstream.stock_worker import StockWorker
from ..upstream.sweep import causes

SAMPLE = [
    # One matrix looked up by words and multiplied for logits, each over another base.
    *("LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "MambaForCausalLM"),
    # No head of its own when it is tied.
    "MptForCausalLM",
    # A softmax with a bias that is tied too, a narrower embedding.
    *("AlbertForMaskedLM", "ElectraForMaskedLM", "ModernBertForMaskedLM"),
    # Parts of encoder-decoders.
    *("T5EncoderModel", "WhisperForCausalLM"),
    # Encoder-decoders, in three schemes, and one with sound in front.
    *("BartForConditionalGeneration", "WhisperForConditionalGeneration"),
    # Words beside images, below another config.
    "LlavaForConditionalGeneration",
    # Ties of layers that have no role, their patterns overlapping.
    "RTDetrV2ForObjectDetection",
]


@pytest.fixture(autouse=True)
def _quiet():
    """What is told of each of a thousand files would bury what is found."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def worker():
    with StockWorker() as worker:
        yield worker


@pytest.mark.parametrize("name", SAMPLE)
def test_a_held_model_lives_as_an_untouched_one(name, worker):
    examination = examine(name, worker)
    assert examination.findings == []
    assert not examination.left_out
    assert sum(map(len, examination.steps.values())) >= 9


def test_a_class_with_nothing_to_tie_is_left_out(worker):
    assert examine("BertModel", worker).left_out == "nothing is tied"


def test_a_file_that_is_not_stocks_is_found(worker, monkeypatch):
    stock_save = TiedModelMixin.save_pretrained

    def portable(model, folder, **kwargs):
        model.config.tying = model.config.tying | {"save_format": "portable"}
        stock_save(model, folder, **kwargs)

    monkeypatch.setattr(TiedModelMixin, "save_pretrained", portable)
    found = examine("LlamaForCausalLM", worker).findings
    assert any(f.step == "file" and "has besides ['lm_head.weight']" in f.what for f in found)


def test_values_that_tying_changes_are_found(worker, monkeypatch):
    tie = examining.tie

    def careless(model, *args, **kwargs):
        tie(model, *args, **kwargs).get_output_embeddings().weight.data[5] += 1
        return model

    monkeypatch.setattr(examining, "tie", careless)
    assert {"as it is", "file", "file in stock"} <= {f.step for f in examine("LlamaForCausalLM", worker).findings}


def test_findings_of_several_classes_with_one_cause_are_told_once():
    findings = [
        examining.Finding("AForCausalLM", "two_way", "file", "KeyError: 'a.embed.weight'"),
        examining.Finding("BForCausalLM", "two_way", "from untied: file", "KeyError: 'wte.weight'"),
        examining.Finding("BForCausalLM", "two_way", "resized up", "KeyError: 'wte.weight'"),
    ]
    assert [len(alike) for alike in causes(findings).values()] == [2, 1]
