"""The papers' losses as pure functions, each with a module of the same name and a reference in plain torch.

Nothing here needs more than torch. What a training step of a whole model makes of them is in `hf_tying.objectives`.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {
    "tied_embedding": "embedding",
    "TiedEmbedding": "embedding",
    "tied_cross_entropy": "cross_entropy",
    "TiedCrossEntropy": "cross_entropy",
    "reference_cross_entropy": "reference",
    "tied_log_probs": "log_probs",
    "TokenLogProbs": "log_probs",
    "tied_distillation": "distillation",
    "top_k_distillation": "distillation",
    "augmented_loss": "augmented",
    "AugmentedLoss": "augmented",
    "contrastive_weight_tying_loss": "contrastive",
    "ContrastiveWeightTyingLoss": "contrastive",
    "projection_penalty": ".projection.penalty",
    "ProjectionPenalty": ".projection.penalty",
}

__all__ = [
    "tied_embedding",
    "TiedEmbedding",
    "tied_cross_entropy",
    "TiedCrossEntropy",
    "reference_cross_entropy",
    "tied_log_probs",
    "TokenLogProbs",
    "tied_distillation",
    "top_k_distillation",
    "augmented_loss",
    "AugmentedLoss",
    "contrastive_weight_tying_loss",
    "ContrastiveWeightTyingLoss",
    "projection_penalty",
    "ProjectionPenalty",
]

if TYPE_CHECKING:
    from ..projection.penalty import ProjectionPenalty, projection_penalty
    from .augmented import AugmentedLoss, augmented_loss
    from .contrastive import ContrastiveWeightTyingLoss, contrastive_weight_tying_loss
    from .cross_entropy import TiedCrossEntropy, tied_cross_entropy
    from .distillation import tied_distillation, top_k_distillation
    from .embedding import TiedEmbedding, tied_embedding
    from .log_probs import TokenLogProbs, tied_log_probs
    from .reference import reference_cross_entropy
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
