"""A further entry of `tying` is one line in a dict and one module: the core learns nothing of it."""

import copy
import json
import pickle
import sys
import types

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from hf_tying import TyingConfig, TyingError, assert_tied, tie
from hf_tying.config import EXTENSIONS, Extension
from hf_tying.ties import extensions

from ..forms import tied_model
from ..tiny import tiny_config, tiny_inputs, tiny_model, without_dropout

TOY = '''
from hf_tying.config import TyingError
from hf_tying.ties.classes import with_mixin


class ToyMixin:
    """Adds what the entry says to the loss of a training step."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if self.training and outputs.loss is not None:
            outputs.loss = outputs.loss + self.config.tying["toy"]
        return outputs


def refuse_misfit(model, value):
    if not isinstance(value, int) or value < 0:
        raise TyingError(f"A toy is {value!r}: expected a number of 0 or more.")


def honour(model, value, strict=True):
    if strict and not isinstance(model, ToyMixin):
        refuse_misfit(model, value)
        model.__class__ = with_mixin(ToyMixin, type(model))
'''


@pytest.fixture
def toy(monkeypatch):
    """One file, and one line."""
    module = types.ModuleType("hf_tying.toy")
    monkeypatch.setitem(sys.modules, "hf_tying.toy", module)
    exec(TOY, vars(module))
    module.ToyMixin.__module__ = "hf_tying.toy"
    monkeypatch.setitem(EXTENSIONS, "toy", Extension("toy"))
    return module


def added(model) -> float:
    """What a training step has in its loss beside what evaluation has."""
    inputs = tiny_inputs(model)
    with torch.no_grad():
        return float(without_dropout(model)(**inputs).loss - model.eval()(**inputs).loss)


ENTRY = {"version": 1, "scheme": "two_way", "toy": 3}


def test_a_model_that_declares_it_has_it(toy):
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2", tying=ENTRY))
    assert isinstance(model, toy.ToyMixin) and type(model).__name__ == "GPT2LMHeadModel"
    assert added(model) == pytest.approx(3, abs=1e-4)
    assert model.config.tying["toy"] == 3
    assert_tied(model)


def test_tie_gives_it_to_a_live_model_and_a_later_tie_leaves_it(toy):
    model = tie(tiny_model("gpt2"), TyingConfig("two_way", extensions={"toy": 2}))
    tie(model, "none")
    assert model.config.tying["toy"] == 2 and added(model) == pytest.approx(2, abs=1e-4)


def test_a_file_carries_it_and_a_copy_and_a_pickle_keep_it(toy, tmp_path):
    model = tie(tiny_model("gpt2"), TyingConfig("two_way", extensions={"toy": 2}))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tying"]["toy"] == 2
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert added(again) == pytest.approx(2, abs=1e-4)
        assert_tied(again)


def test_another_head_over_the_same_file_is_left_alone(toy, tmp_path):
    tie(tiny_model("gpt2"), TyingConfig("two_way", extensions={"toy": 2})).save_pretrained(tmp_path)
    assert not isinstance(AutoModel.from_pretrained(tmp_path), toy.ToyMixin)


def test_what_it_refuses_is_refused_before_anything_is_changed(toy):
    model = tiny_model("gpt2", tie_word_embeddings=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TyingError, match="A toy is -1: expected a number of 0 or more"):
        tie(model, TyingConfig("two_way", extensions={"toy": -1}), init_from="mean")
    assert type(model) is type(tiny_model("gpt2")) and not hasattr(model.config, "tying")
    assert all((before[name] == value).all() for name, value in model.state_dict().items())


def test_a_key_that_nobody_honours_is_refused():
    with pytest.raises(TyingError, match="unknown key 'toy'"):
        TyingConfig.from_dict(ENTRY)
    with pytest.raises(TyingError, match="Unknown extension 'toy'"):
        TyingConfig("two_way", extensions={"toy": 3})
    with pytest.raises(TyingError, match="Unknown extension 'loss'"):  # it is a field
        TyingConfig("two_way", extensions={"loss": "tied"})


def test_without_its_module_it_is_an_error_unless_one_can_go_without(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "hf_tying.toy", None)
    with pytest.raises(ImportError):
        AutoModelForCausalLM.from_config(tiny_config("gpt2", tying=ENTRY))
    said = []
    monkeypatch.setattr(extensions.logger, "warning", said.append)
    monkeypatch.setitem(EXTENSIONS, "toy", Extension("toy", without="there is no toy"))
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2", tying=ENTRY))
    assert added(model) == 0 and any("needs hf_tying: there is no toy" in message for message in said)


def test_it_is_written_only_where_it_is_declared(toy, form):
    assert "toy" not in tied_model(form).config.tying
    assert TyingConfig.from_dict(ENTRY).to_dict()["toy"] == 3
    assert TyingConfig.from_dict(TyingConfig.from_dict(ENTRY).to_dict()) == TyingConfig.from_dict(ENTRY)
