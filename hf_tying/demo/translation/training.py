"""Train one of the models with `Seq2SeqTrainer`, let it translate what was held out, and score that."""

import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from ...metrics import Bleu, ChrF
from ...metrics.translation import generated_text
from ...objectives.own_loss import set_accepts_loss_kwargs
from ...training.translation import translation_collator
from ..measuring import StepClock, common_arguments, optimizer_bytes, train_quietly
from ..settings import TranslationSettings
from .corpus import Corpora

# Languages written without spaces: BLEU counts n-grams of characters there, which needs no segmenter to be installed.
_NO_SPACES = {"bo", "dz", "ja", "km", "lo", "my", "th", "yue", "zh"}

# Batches that are sorted by length together: many, that they have little padding; few, that they stay random.
_POOL = 50


@dataclass
class TranslationRun:
    """A trained model and what was measured on it.

    Args:
        model (`PreTrainedModel`): trained, in eval mode.
        tokens (`int`): source and target tokens trained on, padding not counted.
        tokens_per_second (`float`): of the step at the upper quartile, validation not counted: whatever else the
            machine does can only slow a step down.
        optimizer_bytes (`int`): AdamW's states as they were in memory.
        data (`str`): digest of every batch in its order.
        history (`list[dict]`): the trainer's log.
        translations (`list[str]`): of the held-out sentences, greedy.
        exact_match (`float`): share of these that are the reference, letter for letter.
        bleu, chrf (`dict`): `score` and `signature` of sacrebleu.
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
    """Train `model` in place for `settings.steps` steps and score its translations of the held-out sentences.

    Args:
        model (`PreTrainedModel`): one of the three.
        name (`str`): shown on the progress bar.
        settings (`TranslationSettings`): steps, sizes, seed.
        corpora (`Corpora`): what to train and to validate on.
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
    """The pairs of all steps: batches of like length, so that little is padding, in an order that is random.

    `train_sampling_strategy="group_by_length"` gives such batches from long to short, fifty at a time, so that
    neighbours in training are all alike.

    Args:
        corpora (`Corpora`): the training pairs.
        settings (`TranslationSettings`): steps, batch size, seed.

    Returns:
        `list[int]`: `steps * batch_size` row numbers; each pair once before any comes again, but for less than a batch
        that is left out of each pass, another each time.
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
    model: PreTrainedModel, tokenizer, sentences: list[str], max_length: int, batch_size: int = 128
) -> list[str]:
    """Greedy translations, in the order of the sentences.

    Args:
        model (`PreTrainedModel`): in eval mode.
        tokenizer: of both languages.
        sentences (`list[str]`): to translate; longer ones than `max_length` tokens are cut, as in training.
        max_length (`int`): tokens of a translation at most.
        batch_size (`int`, default 128): sentences at a time, those of like length together.
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
    """Counts the tokens of each step, and keeps a digest of what the model was given to learn from."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.digest = hashlib.sha256()
        self.tokens: list[int] = []

    def training_step(self, model, inputs, *args, **kwargs):
        for key in ("input_ids", "labels"):
            self.digest.update(inputs[key].cpu().numpy().tobytes())
        self.tokens.append(int(inputs["attention_mask"].sum() + (inputs["labels"] != -100).sum()))
        return super().training_step(model, inputs, *args, **kwargs)
