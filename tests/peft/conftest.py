"""The model of most tests of this room."""

import pytest

from ..tied_lora import tied_lora
from ..tiny import tiny_model


@pytest.fixture
def model():
    """A Llama with a few thousand parameters under a Tied-LoRA adapter that is not zero."""
    return tied_lora(tiny_model("llama"))
