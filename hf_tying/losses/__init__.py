"""The papers' losses as pure functions, each with a module of the same name and a reference in plain torch.

Nothing here needs more than torch. What a training step of a whole model makes of them is in `hf_tying.objectives`.
"""

from .._lazy import lazy_names

_HOME = {
    "tied_embedding": "embedding",
    "TiedEmbedding": "embedding",
    "tied_cross_entropy": "cross_entropy",
    "TiedCrossEntropy": "cross_entropy",
    "reference_cross_entropy": "reference",
    "augmented_loss": "augmented",
    "AugmentedLoss": "augmented",
    "contrastive_weight_tying_loss": "contrastive",
    "ContrastiveWeightTyingLoss": "contrastive",
    "projection_penalty": ".projection.penalty",
    "ProjectionPenalty": ".projection.penalty",
}

__all__ = [*_HOME]

__getattr__, __dir__ = lazy_names(globals(), _HOME)
