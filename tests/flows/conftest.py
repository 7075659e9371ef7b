import pytest

from .kinds import KINDS, made


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(kind):
    """A small Llama of the kind."""
    return made(kind)
