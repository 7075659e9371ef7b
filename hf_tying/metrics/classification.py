"""Macro-averaged F1 and the expected calibration error of a classifier, without a further library."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike

_F1_DESCRIPTION = """
Mean of the F1 scores of all classes that occur in the predictions or the references, each class with the same weight.
F1 is 2 TP / (2 TP + FP + FN).
"""

_F1_INPUTS = """
Args:
    predictions (`list[int]`): predicted class of each text; with `config_name="multilabel"`, lists of 0 and 1.
    references (`list[int]`): true class of each text; lists of 0 and 1.
Returns:
    macro_f1 (`float`): from 0 to 1.
Examples:
    >>> from hf_tying.metrics import MacroF1
    >>> round(MacroF1().compute(predictions=[0, 0, 1], references=[0, 1, 1])["macro_f1"], 4)
    0.6667
"""

_ECE_DESCRIPTION = """
Expected calibration error (Guo et al. 2017, equation 3): texts are put into bins by the probability of their predicted
class; the error is the mean, over all texts, of the distance between the mean probability and the accuracy of a bin.
"""

_ECE_INPUTS = """
Args:
    predictions (`list[list[float]]`): probability of each class for each text.
    references (`list[int]`): true class of each text; with `config_name="multilabel"`, lists of 0 and 1. Each class is
        then a prediction of its own.
    bins (`int`): number of bins of equal width. Default 15.
Returns:
    ece (`float`): from 0 to 1.
Examples:
    >>> from hf_tying.metrics import ExpectedCalibrationError
    >>> ExpectedCalibrationError().compute(predictions=[[0.75, 0.25], [0.25, 0.75]], references=[0, 0])
    {'ece': 0.25}
"""


class MacroF1(evaluate.Metric):
    """Macro-averaged F1, with `config_name="multilabel"` for texts of several classes; an `evaluate.Metric`."""

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("int64")
        value = datasets.Sequence(value) if self.config_name == "multilabel" else value
        return evaluate.MetricInfo(
            description=_F1_DESCRIPTION,
            citation="",
            inputs_description=_F1_INPUTS,
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: Sequence, references: Sequence) -> dict[str, float]:
        predicted, true = np.asarray(predictions), np.asarray(references)
        if not len(predicted):
            raise ValueError("Macro F1 needs one prediction at least, found none.")
        if self.config_name != "multilabel":
            classes = np.union1d(predicted, true)
            predicted, true = predicted[:, None] == classes, true[:, None] == classes
        predicted, true = predicted.astype(bool), true.astype(bool)
        found = (predicted & true).sum(axis=0)
        counted = predicted.sum(axis=0) + true.sum(axis=0)
        scores = np.divide(2 * found, counted, out=np.zeros(len(counted)), where=counted > 0)
        return {"macro_f1": float(scores.mean())}


class ExpectedCalibrationError(evaluate.Metric):
    """Expected calibration error, `config_name="multilabel"` for texts of several classes; an `evaluate.Metric`."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        label = datasets.Sequence(label) if self.config_name == "multilabel" else label
        features = {"predictions": datasets.Sequence(datasets.Value("float64")), "references": label}
        return evaluate.MetricInfo(
            description=_ECE_DESCRIPTION,
            citation="",
            inputs_description=_ECE_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Sequence, references: Sequence, bins: int = 15) -> dict[str, float]:
        return {"ece": calibration(predictions, references, bins).error}


@dataclass(frozen=True)
class Calibration:
    """The bins of a reliability diagram.

    Args:
        confidence: (bins,), mean probability of the predicted class; NaN for an empty bin.
        accuracy: (bins,), share of right predictions; NaN for an empty bin.
        share: (bins,), share of all predictions.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    share: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error, from 0 to 1."""
        filled = self.share > 0
        return float((self.share * np.abs(self.accuracy - self.confidence))[filled].sum())


def calibration(probabilities: ArrayLike, labels: ArrayLike, bins: int = 15) -> Calibration:
    """Put predictions into bins by their probability.

    Args:
        probabilities: (texts, classes).
        labels: (texts,), true classes; (texts, classes), 0 or 1, if each class is a prediction of its own.
        bins: number of bins of equal width from 0 to 1. Default 15. A probability on a bound is in the lower bin.

    Raises:
        ValueError: if there are no texts or bins, the shapes do not fit, a probability is not in [0, 1], or a label is
            none of the classes.

    Source: Guo et al. 2017 section 2.
    """
    values, true = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if values.ndim != 2 or not len(values) or true.shape not in (values.shape, values.shape[:1]):
        raise ValueError(
            "Expected probabilities of shape (texts, classes) and labels of shape (texts,) or (texts, classes), found "
            f"{values.shape} and {true.shape}."
        )
    if not ((values >= 0) & (values <= 1 + 1e-6)).all():
        raise ValueError("Expected probabilities from 0 to 1: give the softmax of the logits.")
    if bins < 1:
        raise ValueError(f"bins={bins}: expected 1 or more.")
    if not ((true >= 0) & (true < (2 if true.ndim == 2 else values.shape[1]))).all():
        raise ValueError(f"The labels go from {true.min()} to {true.max()}, and there are {values.shape[1]} classes.")
    if true.ndim == 2:
        confidence, right = np.maximum(values, 1 - values).ravel(), ((values > 0.5) == (true > 0.5)).ravel()
    else:
        confidence, right = values.max(axis=1), values.argmax(axis=1) == true
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, weights=part, minlength=bins) / counts for part in (confidence, right)]
    return Calibration(means[0], means[1], counts / len(confidence))


def confusion_matrix(predictions: ArrayLike, references: ArrayLike, classes: int) -> np.ndarray:
    """Count the texts of each true class (row) by their predicted class (column).

    Args:
        predictions: (texts,), predicted classes.
        references: (texts,), true classes.
        classes: number of classes.

    Returns:
        (classes, classes), int64.
    """
    places = np.asarray(references) * classes + np.asarray(predictions)
    return np.bincount(places, minlength=classes**2).reshape(classes, classes)
