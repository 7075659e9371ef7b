"""Train a model with `Seq2SeqTrainer`, translate the validation sentences, and score the translations."""

import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ...metrics import Bleu, ChrF
from ...metrics.translation import generated_text
from ...objectives.own_loss import set_accepts_loss_kwargs
from ...training.translation import translation_collator
from ..measuring import StepClock, common_arguments, optimizer_bytes, train_quietly
from ..settings import TranslationSettings
from .corpus import Corpora

# Languages written without spaces. BLEU counts n-grams of characters for these, which needs no segmenter.
_NO_SPACES = {"bo", "dz", "ja", "km", "lo", "my", "th", "yue", "zh"}

# Number of batches that are sorted by length together. More batches have less padding, fewer are more random.
_POOL = 50


@dataclass
class TranslationRun:
    """A trained model with its measurements.

    Args:
        model (`PreTrainedModel`): trained model, in eval mode.
        tokens (`int`): number of source and target tokens in training, without padding.
        tokens_per_second (`float`): speed of the step at the upper quartile of speeds, without validation. Other
            programs on the machine can only slow a step down.
        optimizer_bytes (`int`): size of AdamW's states in memory.
        data (`str`): digest of all batches in their order.
        history (`list[dict]`): log of the trainer.
        translations (`list[str]`): greedy translations of the validation sentences.
        exact_match (`float`): share of translations that are equal to their reference, 0 to 1.
        bleu (`dict`): `score` and `signature` of BLEU.
        chrf (`dict`): `score` and `signature` of chrF.
    """

    model: PreTrainedModel
    tokens: int
    tokens_per_second: float
    optimizer_bytes: int
    data: str
    history: list[dict[str, Any]] = field(repr=False)
    translations: list[str] = field(repr=False)
    exact_match: float
    bleu: dict[str, Any]
    chrf: dict[str, Any]


def train(
    model: PreTrainedModel,
    name: str,
    settings: TranslationSettings,
    corpora: Corpora,
    callbacks: list[TrainerCallback] | None = None,
) -> TranslationRun:
    """Train `model` in place for `settings.steps` steps, and score its translations of the validation sentences.

    Args:
        model (`PreTrainedModel`): model to train.
        name (`str`): name on the progress bar.
        settings (`TranslationSettings`): settings of the demo.
        corpora (`Corpora`): training and validation pairs.
        callbacks (`list[TrainerCallback]`, *optional*): further callbacks.
    """
    clock = StepClock()
    trainer = _RecordingTrainer(
        model=set_accepts_loss_kwargs(model),
        args=_arguments(settings),
        data_collator=translation_collator(model, corpora.tokenizer),
        train_dataset=corpora.train_ids.select(training_order(corpora, settings)),
        eval_dataset=corpora.validation_ids,
        callbacks=[clock, *(callbacks or [])],
    )
    train_quietly(trainer, name, settings.seed, {"loss": "loss", "eval_loss": "validation loss"})
    translations = translated(model, corpora.tokenizer, corpora.validation.source, settings.max_length)
    references = corpora.validation.target
    texts = {"predictions": translations, "references": references}
    tokenize = {"tokenize": "char"} if corpora.validation.target_language.split("_")[0] in _NO_SPACES else {}
    bleu, chrf = Bleu(keep_in_memory=True).compute(**texts, **tokenize), ChrF(keep_in_memory=True).compute(**texts)
    rates = sorted(tokens / seconds for tokens, seconds in zip(trainer.tokens, clock.seconds, strict=True))
    return TranslationRun(
        model=model,
        tokens=sum(trainer.tokens),
        tokens_per_second=rates[len(rates) * 3 // 4],
        optimizer_bytes=optimizer_bytes(trainer.optimizer),
        data=trainer.digest.hexdigest()[:16],
        history=trainer.state.log_history,
        translations=translations,
        exact_match=sum(map(str.__eq__, translations, references)) / len(references),
        bleu={key: bleu[key] for key in ("score", "signature")},
        chrf={key: chrf[key] for key in ("score", "signature")},
    )


def training_order(corpora: Corpora, settings: TranslationSettings) -> list[int]:
    """Choose the pairs of all steps: batches of similar lengths, for little padding, in random order.

    `train_sampling_strategy="group_by_length"` orders such batches from long to short, fifty at a time, so that
    successive batches are similar.

    Args:
        corpora (`Corpora`): training pairs.
        settings (`TranslationSettings`): settings of the demo.

    Returns:
        `list[int]`: `steps * batch_size` row numbers. Each pass has every pair once, except for a random part of less
        than a batch.
    """
    draw = random.Random(settings.seed)
    rows = corpora.train_ids
    lengths = [len(ids) + len(labels) for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)]
    size = min(settings.batch_size, len(lengths))
    order: list[int] = []
    while len(order) < settings.steps * settings.batch_size:
        shuffled = draw.sample(range(len(lengths)), len(lengths) // size * size)
        pools = [
            sorted(shuffled[i : i + _POOL * size], key=lengths.__getitem__)
            for i in range(0, len(shuffled), _POOL * size)
        ]
        batches = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
        order += [row for batch in draw.sample(batches, len(batches)) for row in batch]
    return order[: settings.steps * settings.batch_size]


def translated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: list[str],
    max_length: int,
    batch_size: int = 128,
) -> list[str]:
    """Translate sentences greedily.

    Args:
        model (`PreTrainedModel`): model in eval mode.
        tokenizer: tokenizer of both languages.
        sentences (`list[str]`): sentences to translate. They are cut to `max_length` tokens, as in training.
        max_length (`int`): largest number of tokens of a translation.
        batch_size (`int`, default 128): number of sentences in a batch. Sentences of similar lengths are together.

    Returns:
        `list[str]`: translations in the order of the sentences.
    """
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    translations = [""] * len(sentences)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [sentences[i] for i in chosen], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(model.device)
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_length=max_length,
            num_beams=1,
            do_sample=False,
        )
        for i, text in zip(chosen, generated_text(ids.cpu(), tokenizer), strict=True):
            translations[i] = text
    return translations


def _arguments(settings: TranslationSettings) -> Seq2SeqTrainingArguments:
    return Seq2SeqTrainingArguments(
        **common_arguments(settings),
        per_device_eval_batch_size=128,
        prediction_loss_only=True,
        train_sampling_strategy="sequential",  # the order is `training_order`
    )


class _RecordingTrainer(Seq2SeqTrainer):
    """A trainer that counts the tokens of each step, and keeps a digest of the training data."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.digest = hashlib.sha256()
        self.tokens: list[int] = []

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train one step, and record its data."""
        for key in ("input_ids", "labels"):
            self.digest.update(inputs[key].cpu().numpy().tobytes())
        self.tokens.append(int(inputs["attention_mask"].sum() + (inputs["labels"] != -100).sum()))
        return super().training_step(model, inputs, *args, **kwargs)
