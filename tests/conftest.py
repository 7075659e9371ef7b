"""One quiet, offline, single-threaded setting for every test, the same whatever ran before it."""

import logging as stdlib_logging
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A cache of this process alone: what other runs and the user's own work have left in theirs decides nothing.
for _name in [name for name in os.environ if name.startswith("HF_") and name.endswith("_CACHE")]:
    del os.environ[_name]
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-tying-tests-")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from transformers.utils import logging  # noqa: E402

torch.set_num_threads(1)

# The same examples in every run, in whatever time: a suite that fails by chance is not believed when it fails by
# right. `--hypothesis-profile random` draws others, and with `--hypothesis-seed N` the same others again.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("steady", derandomize=True, database=None, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("random", settings.get_profile("steady"), derandomize=False)
settings.load_profile("steady")

from .forms import FORMS, tied_model  # noqa: E402


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before the fixtures of a module, which belong to no test: they are the same in any order of tests."""
    _settle()


@pytest.fixture(autouse=True)
def _settled() -> None:
    """After them: a test is the same whether it is the first one of its module or not."""
    _settle()


def _settle() -> None:
    """Set what tests, and scripts that run in their process, change for others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    logging.set_verbosity_warning()
    logging.disable_progress_bar()


@pytest.fixture
def hf_tying(monkeypatch, capsys):
    """Run the command line in this process: exit status, standard output, standard error."""
    from hf_tying.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-tying", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture(params=FORMS)
def form(request) -> str:
    """Both forms of a tied model."""
    return request.param


@pytest.fixture
def model(form):
    """A GPT-2 with a few thousand parameters, tied two_way."""
    return tied_model(form)


@pytest.fixture
def told() -> Iterator[list[str]]:
    """The messages in this package's log. What is logged once in a process can be logged once more."""
    yield from _messages("hf_tying")


@pytest.fixture
def told_with_transformers() -> Iterator[list[str]]:
    """These, and the messages of transformers, which its own handlers keep from pytest."""
    yield from _messages("hf_tying", "transformers")


def _messages(*loggers: str) -> Iterator[list[str]]:
    messages: list[str] = []
    handler = stdlib_logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    stdlib_logging.Logger.warning_once.cache_clear()
    for name in loggers:
        stdlib_logging.getLogger(name).addHandler(handler)
    yield messages
    for name in loggers:
        stdlib_logging.getLogger(name).removeHandler(handler)
