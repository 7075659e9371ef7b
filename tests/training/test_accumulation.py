"""One update is one gradient, however its rows are spread over processes and steps of accumulation."""

import logging
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import (
    EncoderDecoderConfig,
    EncoderDecoderModel,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_tying import TyingCallback, use_tied_loss
from hf_tying.demo import training as language_model
from hf_tying.demo.translation import training as translation
from hf_tying.objectives.own_loss import averages_own_loss
from hf_tying.training import set_accepts_loss_kwargs

from ..processes import run_script
from ..scripts.two_processes_accumulation import HOW, OWN_MEAN, compared, make
from ..tiny import tiny_config, tiny_model

ONCE = {"times": pytest.approx(1, rel=1e-4), "apart": pytest.approx(0, abs=1e-4)}
TWICE = ONCE | {"times": pytest.approx(2, rel=1e-4)}


@pytest.mark.parametrize(("arch", "accumulated"), [("marian", 2), ("llama", 2), ("bart", 1)])
def test_trainer_steps_by_the_mean_gradient_where_it_is_told_what_the_loss_is(arch, accumulated):
    assert compared(arch, "told", accumulated=accumulated) == ONCE
    assert compared(arch, "stock", accumulated=accumulated) == (ONCE if arch == "llama" or accumulated == 1 else TWICE)


@pytest.mark.parametrize(
    ("arch", "how"),
    [*(("bert", how) for how in ("tied loss", "augmented", "contrastive", "headless")), ("bart", "contrastive")],
)  # beside those of two processes
def test_the_tied_loss_and_the_objectives_tell_it_by_themselves(arch, how):
    assert compared(arch, how, accumulated=2) == ONCE


@pytest.mark.parametrize("accumulated", [1, 2, 4])
@pytest.mark.parametrize(
    ("arch", "how"), [("llama", "projection"), ("tied_lstm", "projection"), ("tied_lstm", "stock")]
)
def test_a_penalty_counts_once_for_an_update(arch, how, accumulated):
    assert compared(arch, how, accumulated=accumulated) == ONCE


@pytest.fixture(scope="module")
def of_two():
    return run_script("two_processes_accumulation.py", processes=2)


def test_two_processes_step_by_the_mean_gradient(of_two):
    stock = {case: found for case, found in of_two.items() if case.endswith("stock")}
    assert stock == dict.fromkeys(("llama stock", "tied_lstm stock"), ONCE) | {
        f"{arch} stock": TWICE for arch in ("bart", "t5", "bert")
    }
    assert {case: found for case, found in of_two.items() if case not in stock} == {
        case: ONCE for case in of_two if case not in stock
    }


# --- who is told -----------------------------------------------------------------------------------------------------


class Divides(T5ForConditionalGeneration):
    def forward(self, *args, num_items_in_batch=None, **kwargs):
        return super().forward(*args, **kwargs)


class CallsLossFunction(T5ForConditionalGeneration):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = super().forward(input_ids=input_ids, decoder_input_ids=labels).logits
        return {"loss": self.loss_function(logits, labels, self.config.vocab_size, **kwargs), "logits": logits}


class PassesOn(T5ForConditionalGeneration):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class NoKeywords(T5ForConditionalGeneration):
    def forward(self, input_ids=None, labels=None):
        return super().forward(input_ids=input_ids, labels=labels)


def encoder_decoder():
    return EncoderDecoderModel(
        EncoderDecoderConfig.from_encoder_decoder_configs(tiny_config("bert"), tiny_config("bert"))
    )


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        *((lambda arch=arch: make(arch), True) for arch in OWN_MEAN),
        (encoder_decoder, True),
        (lambda: tiny_model("gpt2"), False),
        (lambda: tiny_model("llama"), False),
        (lambda: use_tied_loss(tiny_model("bert")), True),
        (lambda: PassesOn(tiny_config("t5")), True),
        (lambda: Divides(tiny_config("t5")), False),
        (lambda: CallsLossFunction(tiny_config("t5")), False),
        (lambda: NoKeywords(tiny_config("t5")), False),
    ],
)
def test_a_mean_of_its_own_is_seen_in_the_code_of_forward(make, expected):
    model = make()
    assert averages_own_loss(model) is expected
    assert getattr(set_accepts_loss_kwargs(model), "accepts_loss_kwargs", True) is not expected


def test_a_value_that_is_there_stays():
    model = tiny_model("t5")
    model.accepts_loss_kwargs = True
    assert set_accepts_loss_kwargs(model).accepts_loss_kwargs is True
    assert not hasattr(set_accepts_loss_kwargs(tiny_model("gpt2")), "accepts_loss_kwargs")


@pytest.mark.parametrize(
    ("arch", "how", "accumulated", "more", "warned"),
    [
        ("bart", "stock", 2, {}, True),
        ("bart", "stock", 1, {}, False),
        ("bart", "stock", 2, {"label_smoothing_factor": 0.1}, False),
        ("bart", "told", 2, {}, False),
        ("gpt2", "stock", 2, {}, False),
    ],
)
def test_the_callback_warns_of_a_multiplied_gradient(arch, how, accumulated, more, warned, tmp_path, caplog):
    args = TrainingArguments(tmp_path, use_cpu=True, gradient_accumulation_steps=accumulated, **more)
    model = HOW[how](tiny_model(arch))
    trainer = Trainer(model, args)
    with caplog.at_level(logging.WARNING, "hf_tying"):
        logging.getLogger("hf_tying").addHandler(caplog.handler)
        TyingCallback().on_train_begin(args, trainer.state, trainer.control, model=model)
        logging.getLogger("hf_tying").removeHandler(caplog.handler)
    told = [
        record.getMessage() for record in caplog.records if "set_accepts_loss_kwargs(model)" in record.getMessage()
    ]
    assert bool(told) is warned
    assert not warned or "multiplied by 2 (1 processes x 2 accumulation steps)" in told[0]


class Made(Exception):
    """A trainer was made of a model."""


@pytest.mark.parametrize("demo", [language_model, translation], ids=["language model", "translation"])
def test_the_demo_tells_the_trainer_what_the_loss_is(demo, monkeypatch):
    def made(self, model, **kwargs):
        raise Made(model)

    monkeypatch.setattr(Trainer, "__init__", made)
    monkeypatch.setattr(demo, "_arguments", lambda settings: None)
    monkeypatch.setattr(translation, "training_order", lambda corpora, settings: [])
    model, rows = tiny_model("bart"), Dataset.from_dict({"input_ids": [[1]]})
    corpora = SimpleNamespace(tokenizer=None, train_ids=rows, validation_ids=rows)
    data = (corpora,) if demo is translation else (rows, rows)
    with pytest.raises(Made):
        demo.train(model, "name", None, *data)
    assert model.accepts_loss_kwargs is False
