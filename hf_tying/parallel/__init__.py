"""Ties over several processes: a plan that one can read, the engines that keep it, checkpoints that are whole."""

from .._lazy import lazy_names

_HOME = {
    "ParallelPlan": "plan",
    "last_complete_checkpoint": "checkpoints",
    "parallel_plan": "plan",
    "seal_checkpoint": "checkpoints",
}

__all__ = [*_HOME]

__getattr__, __dir__ = lazy_names(globals(), _HOME)
