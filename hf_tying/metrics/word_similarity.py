"""Word similarity: whether words that people find similar have similar rows in an embedding."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import ArrayLike

from ..ties.sharding import whole

_DESCRIPTION = """
Spearman's rank correlation between the cosine similarities of word pairs and the scores that people gave them. Pairs
with a word that has no row are counted and left out.
"""

_INPUTS = """
Args:
    predictions (`list[float]`): similarity of each pair; NaN for a pair with an unknown word.
    references (`list[float]`): score of each pair.
Returns:
    spearman (`float`): correlation from -1 to 1; NaN for fewer than two pairs, or if all values of one side are equal.
    pairs (`int`): number of pairs in the correlation.
    unknown (`int`): number of pairs that are left out.
Examples:
    >>> from hf_tying.metrics import WordSimilarity
    >>> WordSimilarity().compute(predictions=[0.1, 0.9, 0.2, float("nan")], references=[1.0, 9.0, 3.0, 5.0])
    {'spearman': 1.0, 'pairs': 3, 'unknown': 1}
"""


class WordSimilarity(evaluate.Metric):
    """Word similarity. Arguments are those of every `evaluate.Metric`, such as `keep_in_memory=True`."""

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
    """Read word pairs and their scores from a file with two words and a number on each line, split by tabs or spaces.

    SimLex-999, MEN, RW, MTurk-771 and Verb-143 are distributed together in this form.

    Args:
        path: UTF-8 text file.

    Returns:
        The two words and the score of each pair.

    Raises:
        ValueError: if a line has another form, or the file has no pairs.
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
    """Find the row of a word as it is written, or else in lower case.

    Args:
        word: word without spaces.
        vocabulary: `tokenizer.get_vocab()`, whose entries are words, or pieces where `Ġ` or `▁` marks the start of a
            word.

    Returns:
        The row, or `None` if the word is not a single entry.
    """
    for written in (word, word.lower()):
        for entry in (f"Ġ{written}", f"▁{written}", written):
            if entry in vocabulary:
                return vocabulary[entry]
    return None


def word_similarities(
    matrix: torch.Tensor, vocabulary: Mapping[str, int], pairs: list[tuple[str, str, float]]
) -> list[float]:
    """Compute the cosine of the two rows of each pair: the predictions of `WordSimilarity`.

    Args:
        matrix: (V, D), floating point, embedding matrix of any role. The computation is in float64.
        vocabulary: vocabulary of the matrix, see `word_id`.
        pairs: word pairs, see `read_word_pairs`.

    Returns:
        One number for each pair; NaN if a word is unknown or its row is zero.

    Raises:
        ValueError: if the vocabulary has ids beyond the matrix.
    """
    rows = []
    for first, second, _ in pairs:
        ids = word_id(first, vocabulary), word_id(second, vocabulary)
        rows.append(ids if None not in ids else (-1, -1))
    if (largest := max((max(ids) for ids in rows), default=-1)) >= len(matrix):
        raise ValueError(f"A word has the id {largest}, but the matrix {len(matrix)} rows: expected its tokenizer.")
    first, second = torch.tensor(rows, dtype=torch.long).reshape(-1, 2).to(matrix.device).unbind(1)
    matrix = whole(matrix.detach())
    held = [matrix[ids.clamp_min(0)].double() for ids in (first, second)]
    norms = held[0].norm(dim=1) * held[1].norm(dim=1)
    cosines = (held[0] * held[1]).sum(dim=1) / norms  # rows of zeros give NaN on purpose
    return cosines.masked_fill(first < 0, math.nan).tolist()


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Compute Spearman's rank correlation. Equal values share the mean of their ranks.

    Args:
        first: (n,), finite numbers.
        second: (n,), finite numbers.

    Returns:
        The correlation, from -1 to 1; NaN for fewer than two values, or if all values on one side are equal.

    Raises:
        ValueError: if the lengths differ.

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
