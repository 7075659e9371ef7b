"""Ties over several processes: a plan that one can read, the engines that keep it, checkpoints that are whole."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {
    "ParallelPlan": "plan",
    "last_complete_checkpoint": "checkpoints",
    "parallel_plan": "plan",
    "seal_checkpoint": "checkpoints",
}

__all__ = [
    "ParallelPlan",
    "last_complete_checkpoint",
    "parallel_plan",
    "seal_checkpoint",
]

if TYPE_CHECKING:
    from .checkpoints import last_complete_checkpoint, seal_checkpoint
    from .plan import ParallelPlan, parallel_plan
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
