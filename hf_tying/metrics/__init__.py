"""Subclasses of `evaluate.Metric` that are part of the package, so that they need no network."""

from .classification import Calibration, ExpectedCalibrationError, MacroF1, calibration, confusion_matrix
from .perplexity import Perplexity, perplexity_of, sequence_scores
from .translation import Bleu, ChrF, generated_text, translation_metrics
from .word_similarity import WordSimilarity, read_word_pairs, spearman, word_id, word_similarities

__all__ = [
    "Bleu",
    "Calibration",
    "ChrF",
    "ExpectedCalibrationError",
    "MacroF1",
    "Perplexity",
    "WordSimilarity",
    "calibration",
    "confusion_matrix",
    "generated_text",
    "perplexity_of",
    "read_word_pairs",
    "sequence_scores",
    "spearman",
    "translation_metrics",
    "word_id",
    "word_similarities",
]
