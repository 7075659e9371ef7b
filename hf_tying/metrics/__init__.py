"""`evaluate.Metric` subclasses that ship with the package: `compute`, `add` and `add_batch` work with no network."""

from .perplexity import Perplexity, perplexity_of, sequence_scores
from .translation import Bleu, ChrF, generated_text, translation_metrics

__all__ = ["Bleu", "ChrF", "Perplexity", "generated_text", "perplexity_of", "sequence_scores", "translation_metrics"]
