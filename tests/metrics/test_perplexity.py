"""`Perplexity` against the plain definition, and as a metric of `evaluate` and of `Trainer`."""

import math

import evaluate
import pytest
import torch
from transformers import EvalPrediction

from hf_tying.metrics import Perplexity, perplexity_of, sequence_scores


def plain_perplexity(logits, labels):
    """Token by token, from the definition."""
    total, count = 0.0, 0
    for row, targets in zip(logits.double(), labels, strict=True):
        for position in range(len(targets) - 1):
            target = targets[position + 1].item()
            if target != -100:
                total -= torch.log_softmax(row[position], dim=-1)[target].item()
                count += 1
    return math.exp(total / count), count


@pytest.fixture
def batch():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 9, 13) * 3, torch.randint(13, (6, 9))
    labels[0, 4:] = -100
    labels[3] = -100
    return logits, labels


def test_it_is_the_plain_definition_with_ignored_positions(batch):
    logits, labels = batch
    found = perplexity_of(EvalPrediction(predictions=sequence_scores(logits, labels).numpy(), label_ids=labels))
    expected, tokens = plain_perplexity(logits, labels)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found["tokens"] == tokens == 35
    assert found["loss"] == pytest.approx(math.log(expected), rel=1e-5)


def test_half_precision_logits_are_scored_in_float32(batch):
    logits, labels = batch
    halves = logits.to(torch.bfloat16)
    assert torch.equal(sequence_scores(halves, labels), sequence_scores(halves.float(), labels))


def test_logits_that_come_with_other_outputs_are_found(batch):
    logits, labels = batch
    assert torch.equal(sequence_scores((logits, "cache"), labels), sequence_scores(logits, labels))


def test_the_mean_is_over_tokens_however_the_set_is_cut(batch):
    logits, labels = batch
    whole = sequence_scores(logits, labels).double()
    metric = Perplexity(keep_in_memory=True)
    for part in whole.split([1, 3, 2]):
        metric.add_batch(negative_log_likelihoods=part[:, 0].tolist(), token_counts=part[:, 1].int().tolist())
    assert metric.compute()["perplexity"] == pytest.approx(plain_perplexity(logits, labels)[0], rel=1e-5)


def test_it_works_as_any_metric_of_evaluate_does(tmp_path):
    metric = Perplexity(cache_dir=tmp_path)
    metric.add(negative_log_likelihoods=math.log(8), token_counts=1)
    metric.add(negative_log_likelihoods=math.log(2), token_counts=1)
    assert metric.compute()["perplexity"] == pytest.approx(4)
    joined = evaluate.combine([Perplexity(keep_in_memory=True)])
    assert joined.compute(negative_log_likelihoods=[0.0], token_counts=[3]) == {
        "perplexity": 1.0,
        "loss": 0.0,
        "tokens": 3,
    }


def test_what_overflows_is_infinite():
    assert Perplexity(keep_in_memory=True).compute(negative_log_likelihoods=[1e6], token_counts=[1]) == {
        "perplexity": math.inf,
        "loss": 1e6,
        "tokens": 1,
    }


def test_no_token_is_an_error():
    with pytest.raises(ValueError, match="0 tokens: expected at least one"):
        Perplexity(keep_in_memory=True).compute(negative_log_likelihoods=[0.0], token_counts=[0])
