"""Macro-F1 and the calibration error, against their definitions, class by class and bin by bin."""

import numpy as np
import pytest

from hf_tying.metrics import ExpectedCalibrationError, MacroF1, calibration, confusion_matrix


def f1_by_counting(predictions, references) -> float:
    scores = []
    for label in {*predictions, *references}:
        pairs = list(zip(predictions, references, strict=True))
        found = sum(p == label and r == label for p, r in pairs)
        wrong = sum((p == label) != (r == label) for p, r in pairs)
        scores.append(2 * found / (2 * found + wrong))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_macro_f1_by_counting(classes):
    draw = np.random.default_rng(classes)
    predictions, references = draw.integers(0, classes, 40).tolist(), draw.integers(0, classes + 1, 40).tolist()
    found = MacroF1().compute(predictions=predictions, references=references)["macro_f1"]
    assert found == pytest.approx(f1_by_counting(predictions, references), abs=1e-12)


def test_macro_f1_of_several_classes():
    predictions, references = [[1, 0, 0], [1, 1, 0], [0, 0, 0]], [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
    found = MacroF1(config_name="multilabel").compute(predictions=predictions, references=references)["macro_f1"]
    assert found == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_the_calibration_error_bin_by_bin():
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(300, 4)) * 2, draw.integers(0, 4, 300)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = 0.0
    for bin_number in range(10):
        rows = [i for i, row in enumerate(probabilities) if bin_number / 10 < row.max() <= (bin_number + 1) / 10]
        if rows:
            accuracy = np.mean([probabilities[i].argmax() == labels[i] for i in rows])
            expected += len(rows) / 300 * abs(accuracy - np.mean([probabilities[i].max() for i in rows]))
    found = ExpectedCalibrationError().compute(predictions=probabilities.tolist(), references=labels.tolist(), bins=10)
    assert found["ece"] == pytest.approx(expected, abs=1e-12)


def test_the_calibration_error_of_several_classes_takes_each_as_a_prediction():
    probabilities, labels = [[0.9, 0.2], [0.6, 0.4]], [[1, 0], [0, 0]]
    metric = ExpectedCalibrationError(config_name="multilabel")
    expected = abs(1 - 0.9) / 4 + abs(1 - 0.8) / 4 + 2 * abs(0.5 - 0.6) / 4
    assert metric.compute(predictions=probabilities, references=labels)["ece"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([[0.5, 0.5]], [0, 1], "shape"),
        ([[1.5, -0.5]], [0], "from 0 to 1"),
        ([[float("nan"), 1]], [0], "from 0 to 1"),
        ([[0.5, 0.5]], [2], "there are 2 classes"),
        ([[0.5, 0.5]], [-1], "there are 2 classes"),
    ],
)
def test_what_is_no_prediction_is_refused(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        calibration(probabilities, labels)


def test_a_probability_on_a_bound_is_in_the_lower_bin():
    found = calibration([[0.5, 0.5], [0.75, 0.25], [1, 0]], [0, 0, 0], bins=4)
    assert found.share.tolist() == [0, 1 / 3, 1 / 3, 1 / 3]


def test_a_confusion_matrix_has_true_classes_in_rows():
    found = confusion_matrix([0, 1, 1, 2], [0, 0, 1, 1], 3)
    assert found.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="one prediction at least"):
        MacroF1().compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="bins=0"):
        calibration([[0.5, 0.5]], [0], bins=0)
