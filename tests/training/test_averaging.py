"""`average_into`: an exponential moving average that moves a tied matrix once; torch's own as the reference."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hf_tying import TyingError, assert_tied, untie
from hf_tying.training import average_into

from ..forms import tied_model
from ..ties.test_names_of import Wrapped
from ..tiny import tiny_model

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


def moved(model):
    """As an optimizer step does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


MODELS = {
    "held": lambda: tied_model("in place"),
    "class form": lambda: tied_model("class form"),
    "three names": lambda: tied_model("in place", "bart", "three_way"),
    "untied": lambda: untie(tied_model("in place")),
    "stock": lambda: tiny_model("gpt2"),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped, torch.compile], ids=["bare", "DDP", "torch.compile"])
def test_it_is_the_average_of_torch(make, wrap):
    model = make()
    average = copy.deepcopy(model).requires_grad_(False)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    reference.update_parameters(model)  # the first of torch's is a copy
    for _ in range(3):
        moved(model)
        average_into(average, wrap(model), decay=0.9)
        reference.update_parameters(model)
    expected = dict(reference.module.named_parameters(remove_duplicate=False))
    found = dict(average.named_parameters(remove_duplicate=False))
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    assert_tied(average)


def test_buffers_are_copied_and_another_precision_is_kept(model):
    model.register_buffer("steps", torch.tensor(0))
    average = copy.deepcopy(model).double()
    start = average.lm_head.weight.clone()
    moved(model).steps += 5
    average_into(average, model, decay=0.75)
    assert int(average.steps) == 5 and average.lm_head.weight.dtype == torch.float64
    assert torch.allclose(average.lm_head.weight, 0.75 * start + 0.25 * model.lm_head.weight.double())
    average_into(average, model, decay=0.0)
    assert torch.equal(average.lm_head.weight, model.lm_head.weight.double())


def test_a_copy_that_is_tied_still_is_refused_and_the_way_out_is_walked(model):
    average = copy.deepcopy(model)
    moved(untie(model))
    before = copy.deepcopy(average.state_dict())
    with pytest.raises(TyingError, match="one parameter in the copy, and not in the model") as error:
        average_into(average, model, decay=0.9)
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
    assert f"untie(averaged, {[HEAD]})" in str(error.value)
    average_into(untie(average, [HEAD]), model, decay=0.9)
    for name, value in average.named_parameters():
        live = dict(model.named_parameters())[name]
        assert torch.allclose(value, 0.9 * before[name] + 0.1 * live, atol=1e-6)


@pytest.mark.parametrize("changed", [
    lambda model: model.resize_token_embeddings(70, mean_resizing=False),
    lambda model: model.register_parameter("scale", torch.nn.Parameter(torch.ones(1))),
], ids=["a shape", "a name"])  # fmt: skip
def test_another_model_is_refused_before_anything_moves(model, changed):
    average = copy.deepcopy(model)
    before = average.lm_head.weight.clone()
    changed(moved(model))
    with pytest.raises(TyingError, match="differ in . parameters.*copy.deepcopy"):
        average_into(average, model, decay=0.9)
    assert torch.equal(average.lm_head.weight, before)
