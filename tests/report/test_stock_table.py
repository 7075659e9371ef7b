"""The table of what transformers' classes tie: each row is what its class says, of the installed version."""

import os

import pytest
import transformers

from hf_tying.report.stock_table import StockClass, config_defaults, stock_class, versions

from .. import zoo
from ..stock_table import defaults_of, row_of
from ..tiny import ALL, AUTO, tiny_config

CLASSES = sorted({type(AUTO[arch].from_config(tiny_config(arch))).__name__ for arch in ALL})


@pytest.mark.parametrize("name", zoo.classes() if os.environ.get("ZOO") else CLASSES)
def test_a_row_is_what_its_class_says(name):
    row, found = stock_class(name), row_of(name)
    assert (None if found is None else StockClass.from_dict(found)) == row


@pytest.mark.parametrize("arch", ALL)
def test_the_defaults_are_those_of_the_config_class(arch):
    assert config_defaults(arch) == defaults_of(type(tiny_config(arch)))


def test_the_installed_version_is_one_of_those_that_the_table_is_made_from():
    assert transformers.__version__ in versions()


def test_a_class_that_has_changed_is_that_of_the_installed_version(monkeypatch):
    name = "Qwen2_5OmniThinkerForConditionalGeneration"
    rows = {}
    for version in ("5.17.0", "5.23.0"):
        monkeypatch.setattr("hf_tying.report.stock_table.installed", lambda version=version: version)
        rows[version] = stock_class(name).roles["target"]
    assert rows == {"5.17.0": ["model.embed_tokens.weight"], "5.23.0": ["model.language_model.embed_tokens.weight"]}


def test_an_unknown_class_has_no_row():
    assert stock_class("HouseModel") is None and config_defaults(5) == {}
