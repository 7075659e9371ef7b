"""Untied models that the tests of this room tie."""

import pytest

from ..tiny import untied_model


@pytest.fixture
def llama():
    return untied_model("llama")


@pytest.fixture
def bart():
    return untied_model("bart")
