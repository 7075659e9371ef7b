"""What the tests of this room set."""

import pytest

from hf_tying.losses import arithmetic


@pytest.fixture
def slow_half(monkeypatch):
    """The same way on every CPU: products are in float32 there. Tests of the other way say so."""
    monkeypatch.setattr(arithmetic, "has_fast_half", lambda dtype: False)
