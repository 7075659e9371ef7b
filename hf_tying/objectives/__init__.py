"""The loss of a model's training steps: cross entropy through the tied softmax, or AL or CWT in its place."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {
    "AugmentedObjective": "objective",
    "ContrastiveObjective": "objective",
    "Objective": "objective",
    "evaluated_by_objective": "tied_loss",
    "has_tied_loss": "tied_loss",
    "objective_of": "tied_loss",
    "use_tied_loss": "tied_loss",
}

__all__ = [
    "AugmentedObjective",
    "ContrastiveObjective",
    "Objective",
    "evaluated_by_objective",
    "has_tied_loss",
    "objective_of",
    "use_tied_loss",
]

if TYPE_CHECKING:
    from .objective import AugmentedObjective, ContrastiveObjective, Objective
    from .tied_loss import evaluated_by_objective, has_tied_loss, objective_of, use_tied_loss
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
