"""PR, projection regularisation (Press & Wolf 2016, section 3.2): a matrix before the softmax, and its penalty."""

from .._lazy import lazy_names

_HOME = {
    "ProjectedLinear": "head",
    "ProjectionPenalty": "penalty",
    "merge_projection": "model",
    "projection_penalty": "penalty",
    "use_projection": "model",
}

__all__ = [*_HOME]

__getattr__, __dir__ = lazy_names(globals(), _HOME)
