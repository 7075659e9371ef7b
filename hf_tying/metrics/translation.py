"""BLEU and chrF by sacrebleu, as metrics of `evaluate` without network, and a function for `Seq2SeqTrainer`."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike
from transformers import EvalPrediction
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .._extras import require

_CITATION = """
Post (2018), A Call for Clarity in Reporting BLEU Scores. {}
"""
_BLEU = "BLEU: Papineni et al. (2002), BLEU: a Method for Automatic Evaluation of Machine Translation."
_CHRF = "chrF: Popovic (2015), chrF: character n-gram F-score for automatic MT evaluation."

_DESCRIPTION = """
{} of translated sentences against references. sacrebleu computes it on plain text, which it tokenizes itself. Report
the signature with the score: it names everything that the score depends on.
"""

_INPUTS = """
Args:
    predictions (`list[str]`): translated sentences, as plain text.
    references (`list[str]` or `list[list[str]]`): the reference of each prediction, or a list of its references.
    bootstrap (`int`, default 0): number of resampled test sets for `mean` and `confidence` (Koehn 2004). 0 is none;
        sacrebleu's command line has 1000. The seed is sacrebleu's own, 12345, which is in the signature.
    **options: options of `sacrebleu.metrics.{}`: {}.
Returns:
    score (`float`): score from 0 to 100.
    signature (`str`): sacrebleu's signature, with its version.
{}    mean (`float`): with `bootstrap`, the mean score of the resampled sets.
    confidence (`float`): with `bootstrap`, half of the interval that has 95 % of their scores.
Examples:
    >>> from hf_tying.metrics import {}
    >>> round({}().compute(predictions=["Two dogs run."], references=["Two dogs run."])["score"], 6)
    100.0
"""
_BLEU_OPTIONS = """`tokenize` (default `"13a"`), `lowercase`, `trg_lang` (chooses the tokenization of
        Chinese, Japanese and Korean), `smooth_method`, `effective_order`, `force`, ..."""
_BLEU_RESULTS = """    precisions (`list[float]`): precisions of n-grams, n = 1 to 4, in percent.
    counts (`list[int]`): number of n-grams that are in a reference.
    totals (`list[int]`): number of n-grams in all predictions.
    bp (`float`): brevity penalty.
    sys_len (`int`): number of words in all predictions.
    ref_len (`int`): number of words in their references.
"""
_CHRF_OPTIONS = "`word_order` (default 0; 2 is chrF++), `char_order`, `beta`, `lowercase`, ..."


class _SacreBleu(evaluate.Metric):
    """The common base of BLEU and chrF: inputs, their checks, and the bootstrap."""

    # evaluate appends the description of the inputs to these docstrings.
    def add_batch(
        self,
        *,
        predictions: Sequence[str] | None = None,
        references: Sequence[str] | Sequence[Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add sentences, which the next `compute` scores together with all others that were added."""
        _check(predictions, references)
        if len(predictions):
            super().add_batch(predictions=predictions, references=references, **kwargs)

    def compute(
        self,
        *,
        predictions: Sequence[str] | None = None,
        references: Sequence[str] | Sequence[Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any] | None:
        """Score the given sentences together with those that were added before."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.writer is None:
            raise ValueError("There is nothing to score: expected at least one prediction and its reference.")
        return super().compute(**kwargs)

    def _metric_info(self, description: str, citation: str, inputs: str) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        forms = [datasets.Sequence(text), text]
        return evaluate.MetricInfo(
            description=_DESCRIPTION.format(description),
            citation=_CITATION.format(citation),
            inputs_description=inputs,
            features=[datasets.Features({"predictions": text, "references": references}) for references in forms],
        )


class Bleu(_SacreBleu):
    """BLEU (Papineni et al. 2002). Arguments are those of every `evaluate.Metric`, such as `keep_in_memory=True`."""

    def _info(self) -> evaluate.MetricInfo:
        return self._metric_info("BLEU", _BLEU, _INPUTS.format("BLEU", _BLEU_OPTIONS, _BLEU_RESULTS, "Bleu", "Bleu"))

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str] | Sequence[Sequence[str]],
        bootstrap: int = 0,
        **options: Any,
    ) -> dict:
        result, score = _scored(_sacrebleu("BLEU", options), predictions, references, bootstrap)
        names = ("precisions", "counts", "totals", "bp", "sys_len", "ref_len")
        return result | {name: getattr(score, name) for name in names}


class ChrF(_SacreBleu):
    """chrF (Popovic 2015). Arguments are those of every `evaluate.Metric`, such as `keep_in_memory=True`."""

    def _info(self) -> evaluate.MetricInfo:
        return self._metric_info("chrF", _CHRF, _INPUTS.format("CHRF", _CHRF_OPTIONS, "", "ChrF", "ChrF"))

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str] | Sequence[Sequence[str]],
        bootstrap: int = 0,
        **options: Any,
    ) -> dict:
        return _scored(_sacrebleu("CHRF", options), predictions, references, bootstrap)[0]


def translation_metrics(
    tokenizer: PreTrainedTokenizerBase,
    target_language: str | None = None,
    references: list[str] | None = None,
    **bleu_options: Any,
) -> Callable[..., dict[str, float]]:
    """Make `compute_metrics` for `Seq2SeqTrainer(args=Seq2SeqTrainingArguments(predict_with_generate=True))`.

    Args:
        tokenizer: tokenizer of the target side.
        target_language (`str`, *optional*): code of the target language, by which BLEU tokenizes Chinese, Japanese and
            Korean. Default: sacrebleu's usual tokenization.
        references (`list[str]`, *optional*): whole sentences, in the order of the evaluation's rows. Default: the
            labels, from which `max_target_length` has cut, and in which a language code may stand (M2M100's `__fr__`).
        **bleu_options: further options of `Bleu`, such as `tokenize` and `lowercase`.

    Returns:
        A function from `transformers.EvalPrediction` (token ids `(sentences, length)`) to a dict of `bleu`, `chrf` and
        `gen_len`, the mean number of generated tokens up to the end token, without padding.

    Raises:
        ImportError: if sacrebleu is not installed. It is raised here, before training.
        RuntimeError: if the packages that sacrebleu needs for Japanese or Korean are not installed.
        ValueError: if sacrebleu does not know an option.
    """
    bleu_options = {"trg_lang": target_language, **bleu_options}
    _sacrebleu("BLEU", bleu_options)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        ids = prediction.predictions
        generated = _up_to_the_end(ids[0] if isinstance(ids, tuple) else ids, tokenizer)
        whole = references
        if whole is None:
            whole = _text([row[row != -100] for row in np.asarray(prediction.label_ids)], tokenizer)
        texts = dict(predictions=_text(generated, tokenizer), references=whole)
        return {
            "bleu": Bleu(keep_in_memory=True).compute(**texts, **bleu_options)["score"],
            "chrf": ChrF(keep_in_memory=True).compute(**texts)["score"],
            "gen_len": float(np.mean([np.count_nonzero(row != tokenizer.pad_token_id) for row in generated])),
        }

    return compute_metrics


def generated_text(ids: ArrayLike, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Decode the token ids that `generate` or `Seq2SeqTrainer.predict` returns.

    Args:
        ids: `(sentences, length)`, one batch, or several batches that are padded to one length with -100. Tokens after
            the end token of a sentence are left out, because `Seq2SeqTrainer` pads with the padding token of its
            `processing_class`. This is a word of the target side if that side has a vocabulary of its own.
        tokenizer: tokenizer of the target side.

    Returns:
        One string for each sentence, without special tokens.
    """
    return _text(_up_to_the_end(ids, tokenizer), tokenizer)


def _up_to_the_end(ids: ArrayLike, tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    rows = [row[row != -100] for row in np.asarray(ids)]
    # The first token does not count, because BART starts decoding with its end token.
    ends = [np.flatnonzero(row[1:] == end) + 1 for row in rows]
    return [row[: found[0] + 1] if len(found) else row for row, found in zip(rows, ends, strict=True)]


def _text(rows: Sequence[np.ndarray], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode([row.tolist() for row in rows], skip_special_tokens=True)]


def _check(predictions: Sequence[str] | None, references: Sequence[str] | Sequence[Sequence[str]] | None) -> None:
    for name, sentences in (("predictions", predictions), ("references", references)):
        if sentences is None or isinstance(sentences, str):
            raise ValueError(f"The {name} are {sentences!r}: expected a list of sentences.")
    if len(predictions) != len(references):
        raise ValueError(
            f"There are {len(predictions)} predictions and {len(references)} references: expected one reference, or "
            "one list of references, for each prediction."
        )
    for i, reference in enumerate(references):
        if not isinstance(reference, str) and not len(reference):
            raise ValueError(f"Prediction {i} has no reference: expected at least one.")


def _sacrebleu(name: str, options: dict) -> Any:
    """Make the metric of sacrebleu with this name."""
    metrics = require("sacrebleu.metrics", name, "metrics")
    if name == "BLEU":
        # zh_CN, zh-Hans and NLLB's zho_Hans are sacrebleu's zh.
        language = (options.get("trg_lang") or "").replace("_", "-").split("-")[0]
        options = {**options, "trg_lang": {"zho": "zh", "jpn": "ja", "kor": "ko"}.get(language, language)}
        known = {"tokenize": [None, *metrics.BLEU.TOKENIZERS], "smooth_method": list(metrics.BLEU.SMOOTH_DEFAULTS)}
        for option in known.keys() & options.keys():
            if options[option] not in known[option]:
                raise ValueError(f"BLEU has no {option} {options[option]!r}: expected one of {known[option]}.")
    return getattr(metrics, name)(**options)


def _scored(
    metric: Any, predictions: Sequence[str], references: Sequence, bootstrap: int
) -> tuple[dict[str, Any], Any]:
    from sacrebleu.significance import _bootstrap_resample, estimate_ci

    if bootstrap < 0 or bootstrap == 1:
        raise ValueError(f"bootstrap is {bootstrap}: expected 0, or a number of samples such as 1000.")
    references = [[one] if isinstance(one, str) else list(one) for one in references]
    most = max(map(len, references))
    # sacrebleu takes the first references of all sentences, then the second ones, with None where there is none.
    streams = [[one[i] if i < len(one) else None for one in references] for i in range(most)]
    # As `corpus_score` does it, which cannot take the mean when a resampled set scores 0 (sacrebleu 2.6).
    statistics = metric._extract_corpus_statistics(list(predictions), streams)
    score = metric._aggregate_and_compute(statistics)
    result = {"score": score.score}
    if bootstrap:
        metric.n_bootstrap = bootstrap
        metric.seed, samples = _bootstrap_resample(statistics, metric, bootstrap)
        mean, confidence = estimate_ci(np.array([sample.score for sample in samples], dtype=float))
        result |= {"mean": float(mean), "confidence": float(confidence)}
    return result | {"signature": metric.get_signature().format()}, score
