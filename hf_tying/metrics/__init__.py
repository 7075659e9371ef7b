"""`evaluate.Metric` subclasses that ship with the package: `compute`, `add` and `add_batch` work with no network."""

from .perplexity import Perplexity, perplexity_of, sequence_scores

__all__ = ["Perplexity", "perplexity_of", "sequence_scores"]
