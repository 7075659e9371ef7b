"""PEFT's tests of LoRA on Tied-LoRA; the control of each is in `stock_lora.py`."""

import pytest
import torch
from lora_tests import collect, of_tied_lora, why_not

from hf_tying.peft import TiedLoraConfig


class LoraConfig(TiedLoraConfig):
    """A `TiedLoraConfig` made from LoRA's settings, or from its own."""

    def __init__(self, **settings):
        self.settings = settings
        super().__init__(**of_tied_lora(settings))


# PEFT's tests have a learning rate for each method that needs its own. The start of a test's name, and the rate.
LEARNING_RATES = {
    # The gradient of the sum of log-softmax outputs is tiny there. PEFT has the same rate, "found through testing",
    # for DoRA, HiRA, VB-LoRA, Lily and AdaMSS.
    "test_only_params_are_updated[Embedding": 100,
    "test_only_params_are_updated[embedding": 100,
}


@pytest.fixture(autouse=True)
def learning_rate(request, monkeypatch):
    rate = next((rate for name, rate in LEARNING_RATES.items() if request.node.name.startswith(name)), None)
    if rate:
        sgd = torch.optim.SGD
        monkeypatch.setattr(torch.optim, "SGD", lambda parameters, lr: sgd(parameters, lr=rate))


globals().update(collect(LoraConfig))


def left_out(item) -> str | None:
    return why_not(item, LoraConfig)
