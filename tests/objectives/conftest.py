"""What the tests of this room watch in a training step."""

import pytest

from hf_tying.objectives import step_loss
from hf_tying.objectives.deferred_logits import DeferredLogits

from .helpers import Seen


@pytest.fixture
def seen(monkeypatch) -> Seen:
    seen, by_blocks, whole = Seen(), step_loss.cross_entropy, DeferredLogits.materialize

    def counted(*args, **kwargs):
        seen.blocks += 1
        return by_blocks(*args, **kwargs)

    def told(self, why):
        seen.whole.append(why)
        return whole(self, why)

    monkeypatch.setattr(step_loss, "cross_entropy", counted)
    monkeypatch.setattr(DeferredLogits, "materialize", told)
    return seen
