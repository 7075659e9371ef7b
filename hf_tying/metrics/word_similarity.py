"""Word similarity: do words that people find alike have rows that point the same way?"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import ArrayLike

_DESCRIPTION = """
Spearman's rank correlation between the cosine similarities of word pairs and the scores that people gave them. Pairs
with a word that has no row are left out, and counted.
"""

_INPUTS = """
Args:
    predictions (`list[float]`): the similarity of each pair; NaN for a pair with an unknown word.
    references (`list[float]`): its score.
Returns:
    spearman (`float`): from -1 to 1; NaN for fewer than two pairs, or where all are alike on one side.
    pairs (`int`): that it is computed from.
    unknown (`int`): left out.
Examples:
    >>> from hf_tying.metrics import WordSimilarity
    >>> WordSimilarity().compute(predictions=[0.1, 0.9, 0.2, float("nan")], references=[1.0, 9.0, 3.0, 5.0])
    {'spearman': 1.0, 'pairs': 3, 'unknown': 1}
"""


class WordSimilarity(evaluate.Metric):
    """The metric; arguments as for every `evaluate.Metric` (`keep_in_memory=True` writes no cache file)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float | int]:
        known = ~np.isnan(np.asarray(predictions, dtype=np.float64))
        found = spearman(np.asarray(predictions)[known], np.asarray(references)[known])
        return {"spearman": found, "pairs": int(known.sum()), "unknown": int((~known).sum())}


def read_word_pairs(path: str | Path) -> list[tuple[str, str, float]]:
    """Pairs and their scores from a file with `word`, `word` and a number on each line, apart by a tab or spaces.

    The form in which SimLex-999, MEN, RW, MTurk-771 and Verb-143 are handed around together.

    Raises:
        ValueError: for another form, with the line, and for a file without pairs.
    """
    pairs = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not (fields := line.split()):
            continue
        try:
            first, second, score = fields
            score = float(score)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(f"{path}, line {number}: expected two words and a number, found {line[:80]!r}.")
        pairs.append((first, second, score))
    if not pairs:
        raise ValueError(f"{path} has no word pairs: expected two words and a number on each line.")
    return pairs


def word_id(word: str, vocabulary: Mapping[str, int]) -> int | None:
    """The row of `word`, as it is written or else in lower case; `None` where it is no single entry.

    Args:
        word: without spaces.
        vocabulary: `tokenizer.get_vocab()`, of whole words, or of pieces where `Ġ` or `▁` marks the start of a word.
    """
    for written in (word, word.lower()):
        for entry in (f"Ġ{written}", f"▁{written}", written):
            if entry in vocabulary:
                return vocabulary[entry]
    return None


def word_similarities(
    matrix: torch.Tensor, vocabulary: Mapping[str, int], pairs: list[tuple[str, str, float]]
) -> list[float]:
    """The cosine of the two rows of each pair; what `WordSimilarity` takes as predictions.

    Args:
        matrix: (V, D), an embedding matrix of any role, floating point; computed in float64.
        vocabulary: see `word_id`.
        pairs: see `read_word_pairs`.

    Returns:
        One number for each pair: NaN where a word is unknown or its row is zero.

    Raises:
        ValueError: when the vocabulary has ids beyond the matrix.
    """
    rows = []
    for first, second, _ in pairs:
        ids = word_id(first, vocabulary), word_id(second, vocabulary)
        rows.append(ids if None not in ids else (-1, -1))
    if (largest := max((max(ids) for ids in rows), default=-1)) >= len(matrix):
        raise ValueError(f"A word has the id {largest}, but the matrix {len(matrix)} rows: expected its tokenizer.")
    first, second = torch.tensor(rows, dtype=torch.long).reshape(-1, 2).to(matrix.device).unbind(1)
    held = [matrix.detach()[ids.clamp_min(0)].double() for ids in (first, second)]
    norms = held[0].norm(dim=1) * held[1].norm(dim=1)
    cosines = (held[0] * held[1]).sum(dim=1) / norms  # NaN of zeros is meant
    return cosines.masked_fill(first < 0, math.nan).tolist()


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks.

    Args:
        first, second: equally long sequences of finite numbers.

    Returns:
        From -1 to 1; NaN for fewer than two values, or where all values on one side are equal.

    Raises:
        ValueError: for different lengths.

    Example (the reference):
        >>> scipy.stats.spearmanr(first, second).statistic
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"Expected two sequences of one length, found shapes {first.shape} and {second.shape}.")
    if len(first) < 2:
        return math.nan
    a, b = (ranks - ranks.mean() for ranks in (_ranks(first), _ranks(second)))
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / scale if scale else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
