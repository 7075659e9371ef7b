"""The three tasks of `run_tied_lora.py`: for each its data, the model's class, how batches are made, and the score."""

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    default_data_collator,
)

from hf_tying import TyingError
from hf_tying.data import blocks_for_language_modeling, encode_parallel, read_parallel_text
from hf_tying.data.labelled import read_rows
from hf_tying.data.text import read_text
from hf_tying.metrics import Bleu, ChrF, generated_text, perplexity_of, sequence_scores
from hf_tying.training.translation import check_fit, translation_collator, use_languages

SPLITS = ("train", "validation", "test")


class Task(ABC):
    """What the tasks have in common.

    Args:
        arguments: the script's `ExperimentArguments`.
        tokenizer: of the model.
    """

    auto_class = task_type = metrics = None
    #: Arguments of the `Trainer`.
    trainer_arguments: dict = {}
    #: Arguments of `from_pretrained`.
    model_arguments: dict = {}

    def __init__(self, arguments, tokenizer):
        self.arguments, self.tokenizer = arguments, tokenizer
        self.texts = {split: self.read(split) for split in SPLITS if split == "train" or self.is_given(split)}
        self.data = {split: self.encode(text) for split, text in self.texts.items()}
        most = arguments.max_train_samples or len(self.data["train"])
        self.data["train"] = self.data["train"].select(range(min(most, len(self.data["train"]))))
        for split, data in self.data.items():
            self.data[split] = data.add_column("length", [self.length(row) for row in data])
        given = [split for split in SPLITS[1:] if split in self.data]
        if not given:
            raise TyingError("Expected a validation file, a test file, or both: see --help.")
        self.scored = given[-1]

    @property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of all texts: equal data, equal fingerprint."""
        return hashlib.sha256(repr(self.texts).encode()).hexdigest()[:16]

    def is_given(self, split: str) -> bool:
        return getattr(self.arguments, f"{split}_file") is not None

    def file(self, split: str) -> str:
        name = getattr(self.arguments, f"{split}_file")
        if name is None:
            raise TyingError(f"Expected --{split}_file for --task {self.arguments.task}.")
        return name

    def length(self, row) -> int:
        """By which examples of like length come into one batch."""
        return len(row["input_ids"])

    def prepare(self, model) -> None:  # noqa: B027  # most tasks have nothing to settle
        """Settle what a fresh model must be told."""

    @abstractmethod
    def read(self, split: str):
        """The texts of a split."""

    @abstractmethod
    def encode(self, texts) -> Dataset:
        """The examples of a split, with `input_ids` and `labels`."""

    @abstractmethod
    def collator(self, model):
        """What makes a batch of examples."""

    @abstractmethod
    def score(self, trainer, folder: Path) -> dict[str, float]:
        """Metrics on the test data, else on the validation data."""


class Classification(Task):
    """Sentences with a label each, from .tsv, .csv or .json (lines) with `sentence` and `label`."""

    auto_class, task_type, metrics = AutoModelForSequenceClassification, "SEQ_CLS", ("accuracy",)

    def __init__(self, arguments, tokenizer):
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        super().__init__(arguments, tokenizer)
        self.trainer_arguments = {"compute_metrics": accuracy}
        ids = {label: i for i, label in enumerate(self.labels)}
        self.model_arguments = {"num_labels": len(ids), "label2id": ids, "id2label": dict(enumerate(ids))}

    def read(self, split):
        rows = read_sentences(self.file(split))
        if split == "train":
            self.labels = sorted({label for _, label in rows})
            if len(self.labels) < 2:
                raise TyingError(f"{self.file(split)!r} has only the label {self.labels[0]!r}: expected two or more.")
        for _, label in rows:
            if label not in self.labels:
                raise TyingError(f"{self.file(split)!r} has the label {label!r}, which the training data has not.")
        return rows

    def encode(self, rows):
        sentences = [sentence for sentence, _ in rows]
        encoded = self.tokenizer(sentences, truncation=True, max_length=self.arguments.max_length)
        names = ("input_ids", "attention_mask")
        columns = {name: encoded[name] for name in names}
        return Dataset.from_dict(columns | {"labels": [self.labels.index(label) for _, label in rows]})

    def prepare(self, model):
        # A decoder is read at the last token that is no padding.
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id

    def collator(self, model):
        return DataCollatorWithPadding(self.tokenizer)

    def score(self, trainer, folder):
        return {"accuracy": 100 * trainer.predict(self.data[self.scored]).metrics["test_accuracy"]}


class LanguageModeling(Task):
    """Text, in blocks of `--max_length` tokens."""

    auto_class, task_type, metrics = AutoModelForCausalLM, "CAUSAL_LM", ("perplexity",)
    trainer_arguments = {"preprocess_logits_for_metrics": sequence_scores, "compute_metrics": perplexity_of}

    def read(self, split):
        return read_text(Path(self.file(split)))

    def encode(self, text):
        return blocks_for_language_modeling([text], self.tokenizer, self.arguments.max_length)

    def collator(self, model):
        return default_data_collator

    def score(self, trainer, folder):
        return {"perplexity": trainer.evaluate(self.data[self.scored])["eval_perplexity"]}


class Translation(Task):
    """Sentence pairs, from two files with a sentence per line."""

    auto_class, task_type, metrics = AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM", ("bleu", "chrf")

    def is_given(self, split):
        return any(getattr(self.arguments, f"{split}_{side}_file") for side in ("source", "target"))

    def read(self, split):
        files = [getattr(self.arguments, f"{split}_{side}_file") for side in ("source", "target")]
        if None in files:
            raise TyingError(f"Expected --{split}_source_file and --{split}_target_file for --task translation.")
        return read_parallel_text(*files, self.arguments.source_lang, self.arguments.target_lang)

    def encode(self, corpus):
        return encode_parallel(corpus, self.tokenizer, None, self.arguments.max_length, self.arguments.max_length)

    def length(self, row):
        return len(row["input_ids"]) + len(row["labels"])

    def prepare(self, model):
        use_languages(model, self.tokenizer, self.arguments.source_lang, self.arguments.target_lang)
        check_fit(model, self.tokenizer, self.tokenizer, self.arguments.max_length, self.arguments.max_length)

    def collator(self, model):
        return translation_collator(model, self.tokenizer)

    def score(self, trainer, folder):
        corpus = self.texts[self.scored]
        trainer.args.predict_with_generate = True
        beams = trainer.args.generation_num_beams or 4
        output = trainer.predict(self.data[self.scored], max_length=self.arguments.max_length, num_beams=beams)
        sentences = [" ".join(text.split()) for text in generated_text(output.predictions, self.tokenizer)]
        (folder / "translations.txt").write_text("".join(f"{text}\n" for text in sentences), encoding="utf-8")
        texts = dict(predictions=sentences, references=corpus.target)
        bleu = Bleu(keep_in_memory=True).compute(**texts, trg_lang=corpus.target_language)
        chrf = ChrF(keep_in_memory=True).compute(**texts)
        return {"bleu": bleu["score"], "chrf": chrf["score"], "bleu_signature": bleu["signature"]}


TASKS = {"classification": Classification, "clm": LanguageModeling, "translation": Translation}


def accuracy(predictions) -> dict[str, float]:
    """The share of examples whose largest logit is that of their label."""
    logits = predictions.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float(np.mean(np.argmax(logits, axis=-1) == predictions.label_ids))}


def read_sentences(name: str) -> list[tuple[str, str]]:
    """Sentences and labels of a file."""
    rows = read_rows(Path(name))
    for i, row in enumerate(rows, start=1):
        if None in (row.get("sentence"), row.get("label")):
            raise TyingError(f"Row {i} of {name!r} lacks sentence or label: expected columns of these names.")
    if not rows:
        raise TyingError(f"{name!r} has no rows below its header.")
    return [(str(row["sentence"]).strip(), str(row["label"])) for row in rows]
