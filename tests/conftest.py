"""One quiet, offline, single-threaded setting for every test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402

torch.set_num_threads(1)
logging.disable_progress_bar()

from .forms import FORMS, tied_model  # noqa: E402


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=FORMS)
def form(request) -> str:
    """Both forms of a tied model."""
    return request.param


@pytest.fixture
def model(form):
    """A GPT-2 with a few thousand parameters, tied two_way."""
    return tied_model(form)
