"""`use_tied_loss` gives any model a class with a tied loss; copies keep that class, and `False` undoes it."""

import copy
import pickle

import pytest
import torch
from transformers import GPT2LMHeadModel

from hf_tying import assert_tied, tie, untie, use_tied_loss
from hf_tying.objectives import step_loss
from hf_tying.objectives.step_loss import LossSettings
from hf_tying.objectives.tied_loss import has_tied_loss
from hf_tying.objectives.tied_loss_mixin import TiedLossMixin

from ..forms import tied_model
from ..tiny import tiny_config, tiny_model, without_dropout
from ..tiny_translation import translation_inputs
from .helpers import DECLARED, Seen, a_tied_gpt2, batch, gpt2, step, three_way, trains_by_blocks


class PassesOn(GPT2LMHeadModel):
    """A user's class that names no parameter of the forward that it wraps."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


#: The ways to a model with a tied loss.
WAYS = {
    "stock class": lambda: use_tied_loss(tiny_model("gpt2")),
    "subclass": lambda: use_tied_loss(PassesOn(tiny_config("gpt2"))),
    "tied before": lambda: use_tied_loss(tied_model("in place")),
    "tied after": lambda: tie(use_tied_loss(tiny_model("gpt2")), "two_way"),
    "untied before": lambda: use_tied_loss(untie(tiny_model("gpt2"))),
    "untied after": lambda: untie(use_tied_loss(tiny_model("gpt2"))),
    "declared": lambda: tie(tiny_model("gpt2"), DECLARED),
    "class form": lambda: use_tied_loss(a_tied_gpt2()),
    "class form, declared": lambda: a_tied_gpt2(loss="tied"),
    "three_way": lambda: use_tied_loss(three_way()),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_tied_loss_trains_by_blocks(way, seen):
    assert trains_by_blocks(WAYS[way](), seen)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_whose_tied_loss_is_undone_has_the_class_that_it_had(way, seen, tmp_path):
    model = WAYS[way]()
    kept = [cls for cls in type(model).__mro__ if cls is not TiedLossMixin and cls.__name__ == "TiedModelMixin"]
    fronted = type(model)
    assert use_tied_loss(model, False) is model and not has_tied_loss(model)
    assert TiedLossMixin not in type(model).__mro__ and type(model) is not fronted
    assert [cls for cls in type(model).__mro__ if cls.__name__ == "TiedModelMixin"] == kept
    assert not {"_tied_loss", "_softmax_name"} & vars(model).keys()
    assert "loss" not in (getattr(model.config, "tying", None) or {})
    assert_tied(model)
    assert not trains_by_blocks(model, seen) and seen.taken() == Seen()
    use_tied_loss(model, False)  # nothing to undo
    model.save_pretrained(tmp_path)
    assert not has_tied_loss(type(model).from_pretrained(tmp_path))
    assert trains_by_blocks(use_tied_loss(model), seen)


def test_a_model_without_a_tie_whose_tied_loss_is_undone_has_the_stock_class():
    model = use_tied_loss(use_tied_loss(tiny_model("gpt2")), False)
    assert type(model) is GPT2LMHeadModel and not hasattr(model.config, "tying")


@pytest.mark.parametrize("way", WAYS)
def test_a_second_use_tied_loss_changes_the_settings_and_not_the_class(way):
    model = WAYS[way]()
    before, inputs = type(model), None
    use_tied_loss(model, label_smoothing=0.25, memory_budget=10_000, backend="torch")
    use_tied_loss(model, label_smoothing=0.5, memory_budget=20_000, backend="torch")
    assert type(model) is before
    assert model._tied_loss == LossSettings(0.5, 20_000, "torch")
    inputs = translation_inputs(model) if model.config.is_encoder_decoder else batch(model)
    smoothed = step(without_dropout(model), inputs).loss.item()
    assert step(use_tied_loss(model), inputs).loss.item() != pytest.approx(smoothed, rel=1e-3)
    assert model._tied_loss == LossSettings() and type(model) is before


def test_the_memory_budget_and_the_backend_reach_the_blocks(monkeypatch):
    given = []
    by_blocks = step_loss.cross_entropy
    monkeypatch.setattr(step_loss, "cross_entropy", lambda *args: given.append(args[-2:]) or by_blocks(*args))
    model = use_tied_loss(gpt2(), memory_budget=12345, backend="torch")
    step(model, batch(model))
    assert given == [(12345, "torch")]


@pytest.mark.parametrize("copied", [
    lambda model, folder: copy.deepcopy(model),
    lambda model, folder: pickle.loads(pickle.dumps(model)),
    lambda model, folder: torch.save(model, folder / "m.pt") or torch.load(folder / "m.pt", weights_only=False),
], ids=["deepcopy", "pickle", "torch.save"])  # fmt: skip
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_has_the_same_class_settings_and_loss(way, copied, seen, tmp_path):
    model = WAYS[way]()
    if way != "class form, declared":
        use_tied_loss(model, label_smoothing=0.0, memory_budget=54321)
    twin = copied(model, tmp_path)
    assert type(twin) is type(model) and twin._tied_loss == model._tied_loss
    assert_tied(twin)
    assert trains_by_blocks(twin, seen)
    use_tied_loss(twin, False)
    assert has_tied_loss(model) and trains_by_blocks(model, seen)
