"""`Bleu` and `ChrF` against sacrebleu and the plain definitions, and as metrics of `evaluate` and `Seq2SeqTrainer`."""

import math
import random
import sys
from collections import Counter

import numpy as np
import pytest
import sacrebleu
from sacrebleu.metrics import BLEU, CHRF
from transformers import EvalPrediction

from hf_tying.data import train_byte_level_bpe
from hf_tying.data.tokenizers import joint_tokenizer
from hf_tying.metrics import Bleu, ChrF, generated_text, translation_metrics

WORDS = "the a dog cat house runs sleeps eats quickly on under , .".split()
METRICS = [(Bleu, BLEU), (ChrF, CHRF)]


@pytest.fixture(scope="module")
def texts():
    generator = random.Random(0)
    references = [" ".join(generator.choices(WORDS, k=generator.randint(4, 12))) for _ in range(60)]
    predictions = []
    for reference in references:
        words = [generator.choice(WORDS) if generator.random() < 0.2 else word for word in reference.split()]
        predictions.append(" ".join(words[: generator.randint(3, 12)]))
    return {"predictions": predictions, "references": references}


def plain_bleu(predictions, references):
    """Papineni et al. (2002), sections 2.1 to 2.3, for sentences that are words between spaces."""
    logs = []
    for n in range(1, 5):
        matches = total = 0
        for prediction, reference in zip(predictions, references, strict=True):
            found, wanted = (
                Counter(zip(*(side.split()[i:] for i in range(n)), strict=False)) for side in (prediction, reference)
            )
            matches += sum(min(count, wanted[ngram]) for ngram, count in found.items())
            total += sum(found.values())
        logs.append(math.log(matches / total))
    length, wanted = (sum(len(text.split()) for text in side) for side in (predictions, references))
    return 100 * math.exp(min(0, 1 - wanted / length) + sum(logs) / 4), length, wanted


def test_bleu_is_the_plain_definition(texts):
    found = Bleu(keep_in_memory=True).compute(**texts, tokenize="none")
    score, length, wanted = plain_bleu(**texts)
    assert found["score"] == pytest.approx(score)
    assert 10 < score < 90
    assert (found["sys_len"], found["ref_len"]) == (length, wanted)
    assert found["bp"] == pytest.approx(math.exp(1 - wanted / length))
    assert found["precisions"] == [
        pytest.approx(100 * c / t) for c, t in zip(found["counts"], found["totals"], strict=True)
    ]


@pytest.mark.parametrize("options", [{}, {"lowercase": True, "tokenize": "intl"}, {"smooth_method": "floor"}])
def test_bleu_and_its_signature_are_sacrebleus(texts, options):
    found = Bleu(keep_in_memory=True).compute(**texts, **options)
    theirs = BLEU(**options)
    assert found["score"] == theirs.corpus_score(texts["predictions"], [texts["references"]]).score
    assert found["signature"] == str(theirs.get_signature())
    assert f"version:{sacrebleu.__version__}" in found["signature"]


@pytest.mark.parametrize("options, name", [({}, "nw:0"), ({"word_order": 2}, "nw:2"), ({"beta": 1}, "nc:6")])
def test_chrf_and_its_signature_are_sacrebleus(texts, options, name):
    found = ChrF(keep_in_memory=True).compute(**texts, **options)
    theirs = CHRF(**options)
    assert found["score"] == theirs.corpus_score(texts["predictions"], [texts["references"]]).score
    assert found["signature"] == str(theirs.get_signature()) and name in found["signature"]
    assert set(found) == {"score", "signature"}


@pytest.mark.parametrize("metric, theirs", METRICS)
def test_the_interval_is_sacrebleus_and_the_same_every_time(texts, metric, theirs):
    found = metric(keep_in_memory=True).compute(**texts, bootstrap=200)
    theirs = theirs()
    expected = theirs.corpus_score(texts["predictions"], [texts["references"]], n_bootstrap=200)
    assert found["mean"] == pytest.approx(expected._mean, rel=1e-6)
    assert found["confidence"] == pytest.approx(expected._ci, rel=1e-6)
    assert 0 < found["confidence"] < found["score"]
    assert found["signature"] == str(theirs.get_signature()) and "bs:200|seed:12345" in found["signature"]
    np.random.seed(1)
    assert metric(keep_in_memory=True).compute(**texts, bootstrap=200) == found


def test_an_interval_is_given_where_some_resampled_sets_score_nothing():
    """sacrebleu's own mean of such samples is a TypeError."""
    found = Bleu(keep_in_memory=True).compute(
        predictions=["a b c d e", "x"], references=["a b c d e", "y"], bootstrap=50
    )
    assert 0 < found["mean"] < 100 and found["confidence"] > 0


@pytest.mark.parametrize("metric, theirs", METRICS)
def test_a_prediction_may_have_several_references_and_not_each_as_many(texts, metric, theirs):
    predictions, one = texts["predictions"], texts["references"]
    two = [[first, second] for first, second in zip(one, predictions, strict=True)]
    assert metric(keep_in_memory=True).compute(predictions=predictions, references=two)["score"] == pytest.approx(100)
    two[0] = two[0][:1]
    found = metric(keep_in_memory=True).compute(predictions=predictions, references=two)
    theirs = theirs()
    expected = theirs.corpus_score(predictions, [one, [None, *predictions[1:]]])
    assert (found["score"], found["signature"]) == (expected.score, str(theirs.get_signature()))
    assert "nrefs:var" in found["signature"]


@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "in a file"])
def test_sentences_may_be_added_one_by_one_and_in_batches(texts, in_memory, tmp_path):
    metric = Bleu(keep_in_memory=in_memory, cache_dir=str(tmp_path))
    predictions, references = texts["predictions"], texts["references"]
    for _ in range(2):  # what was scored is gone
        metric.add(prediction=predictions[0], reference=references[0])
        metric.add_batch(predictions=predictions[1:20], references=references[1:20])
        metric.add_batch(predictions=[], references=[])
        found = metric.compute(predictions=predictions[20:], references=references[20:])
        assert found["score"] == sacrebleu.corpus_bleu(predictions, [references]).score
    assert not list(tmp_path.rglob("*.arrow"))


@pytest.mark.parametrize("code", ["zh", "zh_CN", "zh-Hans", "zho_Hans"])
def test_the_target_language_chooses_the_tokenization(code):
    texts = dict(predictions=["一只狗在跑。"], references=["一只猫在跑。"])
    found = Bleu(keep_in_memory=True).compute(**texts, trg_lang=code)
    assert "tok:zh" in found["signature"]
    assert found["sys_len"] == 6  # characters, where 13a sees two words
    assert "tok:13a" in Bleu(keep_in_memory=True).compute(**texts, trg_lang="de_DE")["signature"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(predictions=["a"], references=["a", "b"]), "1 predictions and 2 references"),
        (dict(predictions=[], references=[]), "nothing to score"),
        ({}, "nothing to score"),
        (dict(predictions="ab", references="ab"), "expected a list of sentences"),
        (dict(predictions=["a"]), "The references are None"),
        (dict(predictions=["a", "b"], references=[["a"], []]), "Prediction 1 has no reference"),
        (dict(predictions=["a"], references=["a"], bootstrap=1), "bootstrap is 1"),
        (dict(predictions=["a"], references=["a"], bootstrap=-5), "bootstrap is -5"),
    ],
)
@pytest.mark.parametrize("metric", [Bleu, ChrF])
def test_what_cannot_be_scored_is_refused(metric, arguments, message):
    with pytest.raises(ValueError, match=message):
        metric(keep_in_memory=True).compute(**arguments)


@pytest.mark.parametrize("options", [{"tokenize": "14a"}, {"smooth_method": "laplace"}])
def test_an_unknown_option_is_named_with_those_that_there_are(options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"no {name} '{value}': expected one of .*'(13a|floor)'"):
        Bleu(keep_in_memory=True).compute(predictions=["a"], references=["a"], **options)
    with pytest.raises(ValueError, match=f"no {name} '{value}'"):
        translation_metrics(None, **options)


def test_without_sacrebleu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-tying\[metrics\]'"):
        ChrF(keep_in_memory=True).compute(predictions=["a"], references=["a"])
    with pytest.raises(ImportError, match=r"pip install 'hf-tying\[metrics\]'"):
        translation_metrics(None)  # before the training, not after an epoch


SENTENCES = ["Zwei Hunde laufen schnell.", "Eine Katze schläft auf der Mauer.", "Wir essen Brot."]


def padded(rows, value):
    length = max(map(len, rows))
    return np.array([row + [value] * (length - len(row)) for row in rows])


@pytest.fixture(scope="module")
def tokenizer():
    return joint_tokenizer(SENTENCES * 3, 300)


@pytest.mark.parametrize("pad", [-100, 0])
def test_the_trainers_ids_become_scores(tokenizer, pad):
    labels = [tokenizer(text)["input_ids"] for text in SENTENCES]
    generated = [[tokenizer.pad_token_id, *row] for row in labels]  # as Marian and T5 begin
    generated[2] = generated[2][:-4] + [tokenizer.eos_token_id]
    found = translation_metrics(tokenizer, "de")(
        EvalPrediction(predictions=padded(generated, pad), label_ids=padded(labels, -100))
    )
    texts = [*SENTENCES[:2], tokenizer.decode(generated[2], skip_special_tokens=True)]
    assert texts[2] != SENTENCES[2] and SENTENCES[2].startswith(texts[2])
    assert found["bleu"] == sacrebleu.corpus_bleu(texts, [SENTENCES]).score < 100
    assert found["chrf"] == sacrebleu.corpus_chrf(texts, [SENTENCES]).score < 100
    assert found["gen_len"] == pytest.approx(np.mean([len(row) - 1 for row in generated]))
    assert all(type(value) is float for value in found.values())
    also = EvalPrediction(predictions=(padded(generated, pad), "states"), label_ids=padded(labels, -100))
    assert translation_metrics(tokenizer, "de")(also) == found


def test_what_follows_the_end_token_is_no_translation(tokenizer):
    """`Seq2SeqTrainer` pads with the source tokenizer's id, which is a word of the target's own vocabulary."""
    target = train_byte_level_bpe(SENTENCES, 300)
    word = target("Hunde")["input_ids"][0]
    begun = [[target.eos_token_id, *target(text)["input_ids"], target.eos_token_id] for text in SENTENCES]
    assert generated_text(padded(begun, word), target) == SENTENCES
    unfinished = [row[:-1] for row in begun]
    assert generated_text(padded(unfinished, -100), target) == SENTENCES
    assert generated_text(np.array([[2, 2, 5]]), tokenizer) == [""]  # BART: begins with </s>, and ends at once
