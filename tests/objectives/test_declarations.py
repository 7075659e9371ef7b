"""A tied loss is declared in the `tying` entry, and stays as declared."""

import sys

import pytest

from hf_tying import TyingConfig, TyingError, assert_tied, tie, untie
from hf_tying.objectives.tied_loss import has_tied_loss
from hf_tying.training import TyingArguments

from ..forms import matrix, tied_model
from ..tiny import layer_pair, tiny_model, without_dropout
from .helpers import DECLARED, Seen, a_tied_gpt2, batch, step, trains_by_blocks


def test_without_the_package_a_published_class_says_so_and_trains_by_the_stock_loss(monkeypatch, told, seen):
    monkeypatch.setitem(sys.modules, "hf_tying.objectives.tied_loss", None)
    model = without_dropout(a_tied_gpt2(loss="tied"))
    assert not has_tied_loss(model) and ["needs hf_tying" in message for message in told] == [True]
    assert step(model, batch(model)).logits is not None and seen.taken() == Seen()


def test_an_entry_without_a_loss_has_no_loss_key():
    assert "loss" not in TyingConfig("two_way").to_dict()
    assert "loss" not in tied_model("in place").config.tying
    assert "loss" not in a_tied_gpt2(loss="stock").config.tying
    assert DECLARED.to_dict()["loss"] == "tied"
    assert TyingConfig.from_dict(DECLARED.to_dict()) == DECLARED


def test_an_empty_loss_in_a_file_is_the_stock_loss():
    assert TyingConfig.from_dict({"version": 1, "loss": None}).loss == "stock"


@pytest.mark.parametrize("loss", ["blocks", "", 3, True, ["tied"]])
def test_an_unknown_loss_in_a_declaration_is_refused(loss):
    for make in (lambda: TyingConfig(loss=loss), lambda: TyingConfig.from_dict({"version": 1, "loss": loss})):
        with pytest.raises(TyingError, match="Unknown loss .*expected 'stock' or 'tied'"):
            make()


def test_the_loss_flag_declares_a_tied_loss_with_a_scheme_and_alone(seen):
    assert TyingArguments().to_tying_config() is None
    assert TyingArguments(scheme="two_way", loss="tied").to_tying_config() == DECLARED
    alone = TyingArguments(loss="tied").to_tying_config()
    assert alone == TyingConfig(loss="tied")
    model = tie(tiny_model("gpt2"), alone)
    assert_tied(model)
    assert matrix(model, "target") is matrix(model, "output") and trains_by_blocks(model, seen)


def test_a_later_tie_that_names_no_loss_leaves_the_loss_as_it_is(seen):
    model = tie(tiny_model("gpt2"), DECLARED)
    for spec in ("none", "two_way", {"mlp": layer_pair(model)}):
        tie(model, spec, init_from="mean")
        assert model.config.tying["loss"] == "tied" and trains_by_blocks(model, seen), spec
    untie(model)
    assert model.config.tying["loss"] == "tied" and trains_by_blocks(model, seen)
