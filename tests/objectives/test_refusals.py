"""`use_tied_loss` refuses what cannot have it with a clear error, and changes nothing."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, GPT2LMHeadModel

from hf_tying import TiedModelMixin, TyingConfig, TyingError, tie, use_tied_loss
from hf_tying.objectives.step_loss import LossSettings

from ..tiny import VOCAB, layer_pair, tiny_model
from .helpers import UNTIED_HEAD, assert_same_step, batch, pair, step

pytestmark = pytest.mark.filterwarnings("ignore")


def int8_head():
    """As quantisers leave it: the matrix is a buffer of small integers."""
    model = tiny_model("llama", **UNTIED_HEAD)
    rows = model.lm_head.weight.detach()
    del model.lm_head.weight
    model.lm_head.register_buffer("weight", (rows * 100).to(torch.int8))
    return model


def int8_parameter():
    """As bitsandbytes leaves it: a parameter of small integers."""
    model = tiny_model("llama", **UNTIED_HEAD)
    rows = (model.lm_head.weight.detach() * 100).to(torch.int8)
    model.lm_head.weight = nn.Parameter(rows, requires_grad=False)
    return model


def dynamic_head():
    return torch.ao.quantization.quantize_dynamic(tiny_model("llama", **UNTIED_HEAD), {nn.Linear})


def classifier():
    return AutoModelForSequenceClassification.from_config(tiny_model("gpt2").config)


@pytest.mark.parametrize("make, message", [
    (lambda: AutoModel.from_config(tiny_model("llama").config), "takes no `labels`. Expected a model with a head"),
    (classifier, "GPT2ForSequenceClassification has no softmax matrix"),
    (int8_head, "'lm_head.weight', is a buffer.*expected a floating-point parameter"),
    (int8_parameter, "'lm_head.weight', is of dtype torch.int8: expected a floating-point parameter"),
    (dynamic_head, "'lm_head.weight', is quantised.*expected a floating-point parameter"),
], ids=["no head", "classifier", "int8 buffer", "int8 parameter", "dynamic"])  # fmt: skip
def test_a_model_that_cannot_have_a_tied_loss_is_refused_and_unchanged(make, message):
    model = make()
    cls, held, config = type(model), set(vars(model)), model.config.to_dict()
    with pytest.raises(TyingError, match=message):
        use_tied_loss(model)
    assert type(model) is cls and set(vars(model)) == held and model.config.to_dict() == config


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None, "gpt2"])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TyingError, match="a (Linear|NoneType|str): expected a transformers PreTrainedModel"):
        use_tied_loss(model)


@pytest.mark.parametrize("kwargs, message", [
    (dict(backend="cuda"), "Unknown backend 'cuda': expected one of .*'torch'"),
    (dict(label_smoothing=1.0), r"label_smoothing=1.0: expected a number in \[0, 1\)"),
    (dict(label_smoothing=-0.1), r"label_smoothing=-0.1: expected a number in \[0, 1\)"),
    (dict(label_smoothing=float("nan")), r"label_smoothing=nan: expected a number in \[0, 1\)"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused_and_the_model_is_unchanged(kwargs, message):
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match=message):
        use_tied_loss(model, **kwargs)
    assert type(model) is GPT2LMHeadModel and not {"_tied_loss", "_softmax_name"} & vars(model).keys()
    use_tied_loss(model, label_smoothing=0.25)
    with pytest.raises(ValueError, match=message):
        use_tied_loss(model, **kwargs)
    assert model._tied_loss == LossSettings(0.25)


def test_a_declared_loss_that_a_model_cannot_have_is_refused_and_changes_nothing():
    body = tiny_model("llama").model
    names = layer_pair(body)
    with pytest.raises(TyingError, match="takes no `labels`"):
        tie(body, TyingConfig(groups={"mlp": names}, loss="tied"), init_from="mean")
    assert not isinstance(body, TiedModelMixin) and getattr(body.config, "tying", None) is None
    assert body.get_parameter(names[0]) is not body.get_parameter(names[1])


def test_a_label_outside_the_vocabulary_is_torchs_own_error():
    stock, tied = pair(tiny_model("gpt2"))
    inputs = batch(stock)
    inputs["labels"][1, 3] = VOCAB
    for model in (stock, tied):
        with pytest.raises(IndexError, match=f"Target {VOCAB} is out of bounds"):
            step(model, inputs)
    assert type(tied.eval()(**batch(stock)).logits) is torch.Tensor  # nothing is left of the error
    assert assert_same_step(tied.train(), stock, batch(stock)).logits is None
