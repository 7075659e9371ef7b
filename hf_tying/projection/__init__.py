"""PR, projection regularisation (Press & Wolf 2016, section 3.2): a matrix before the softmax, and its penalty."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {
    "ProjectedLinear": "head",
    "ProjectionPenalty": "penalty",
    "merge_projection": "model",
    "projection_penalty": "penalty",
    "use_projection": "model",
}

__all__ = [
    "ProjectedLinear",
    "ProjectionPenalty",
    "merge_projection",
    "projection_penalty",
    "use_projection",
]

if TYPE_CHECKING:
    from .head import ProjectedLinear
    from .model import merge_projection, use_projection
    from .penalty import ProjectionPenalty, projection_penalty
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
