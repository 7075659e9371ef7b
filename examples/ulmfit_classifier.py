"""The third stage of `run_ulmfit.py`: the classifier, once or in several rounds, and its predictions."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from ulmfit_data import Data, pieces
from ulmfit_stage import Stage, digest, optimizers, trainer_settings

from hf_tying import TyingCallback
from hf_tying.models import TiedLSTMForSequenceClassification
from hf_tying.training import (
    GradualUnfreezing,
    distillation_labels,
    fit_temperature,
    pseudo_labels,
    recompute_norm_statistics,
    train_from,
)
from hf_tying.training.seeded_order import SeededOrder


@dataclass(frozen=True)
class ClassifierStage:
    """What a classifier is made of: the tuned language model, the texts and the flags."""

    tuned: Stage
    data: Data
    data_args: Any
    model_args: Any
    args: Any

    def settings(self, round_number: int) -> dict[str, Any]:
        """What a classifier of a round depends on."""
        names = (
            *("epochs", "learning_rate", "batch_size", "weight_decay", "label_smoothing", "seed", "self_distillation"),
            *("pseudo_labels", "no_slanted_triangular", "no_discriminative_rates", "no_gradual_unfreezing"),
            "no_calibration",
        )
        settings = {name: getattr(self.args, name) for name in names}
        settings |= {name: getattr(self.data_args, name) for name in ("chunk", "overlap", "chunk_pooling")}
        settings |= {name: getattr(self.model_args, name) for name in ("gradient_length", "no_concat_pooling")}
        data = self.data
        texts = digest(data.splits, data.unlabeled, data.classes, data.several)
        return settings | {"lm": digest(self.tuned.settings), "texts": texts, "round": round_number}


class ClassifierTrainer(Trainer):
    """Orders the texts of an epoch by seed and number of it, so that a run that was stopped sees the same batches."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SeededOrder:
        return SeededOrder(super()._get_train_sampler(*args, **kwargs), self)


def train_rounds(folder: Path, stage: ClassifierStage) -> dict[str, torch.Tensor]:
    """Train the classifier; with self-distillation or pseudo-labels again, by what the one before it predicts.

    Returns:
        Logits of each split, before the temperature, and the `temperature`.
    """
    args = stage.args
    rounds = max(args.self_distillation, int(args.pseudo_labels is not None))
    teacher = None
    for number in range(rounds + 1):
        here = folder if number == rounds else folder.with_name(f"{folder.name}_round_{number + 1}")
        teacher = _train(here, stage, number, teacher)
    return teacher


def _train(folder: Path, stage: ClassifierStage, number: int, teacher: dict | None) -> dict[str, torch.Tensor]:
    data, args = stage.data, stage.args
    record = Stage(folder, stage.settings(number))
    set_seed(args.seed)
    model, tokenizer = _load(record, stage)
    texts, targets = _training_texts(stage, teacher)
    rows = _rows(texts, targets, tokenizer, stage.data_args)[0]
    steps = math.ceil(math.ceil(len(rows) / args.batch_size) * args.epochs)
    trainer = ClassifierTrainer(
        model,
        _training_arguments(record, args),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        optimizers=optimizers(model, args, args.learning_rate, steps, discriminative=True),
        callbacks=[TyingCallback(), *([] if args.no_gradual_unfreezing else [GradualUnfreezing()])],
    )
    if not record.finished:
        train_from(trainer, record.last_checkpoint())
        set_seed(args.seed)  # after a stop too
        recompute_norm_statistics(model, trainer.get_train_dataloader())
    trainer.args.train_sampling_strategy = "random"  # grouped by length, predictions would come in another order
    temperature, model.config.temperature = model.config.temperature, 1.0
    logits = {name: _predict(trainer, split, tokenizer, stage) for name, (split, _) in data.splits.items()}
    if data.unlabeled:
        logits["unlabeled"] = _predict(trainer, data.unlabeled, tokenizer, stage)
    if not record.finished:
        if not args.no_calibration:
            temperature = fit_temperature(logits["validation"], data.targets("validation"), data.several)
        model.config.temperature = temperature
        trainer.save_model(str(folder))
        record.finish(temperature=temperature, texts=len(texts))
    return logits | {"temperature": torch.tensor(temperature)}


def _load(record: Stage, stage: ClassifierStage) -> tuple[TiedLSTMForSequenceClassification, PreTrainedTokenizerBase]:
    """The finished classifier, or a new one over the tuned language model."""
    source, changes = record.folder, {}
    if not record.finished:
        source, classes = stage.tuned.folder, stage.data.classes
        changes = {
            "id2label": dict(enumerate(classes)),
            "label2id": {name: number for number, name in enumerate(classes)},
            "problem_type": "multi_label_classification" if stage.data.several else "single_label_classification",
            "gradient_length": stage.model_args.gradient_length,
            "classifier_pooling": "last" if stage.model_args.no_concat_pooling else "concat",
        }
    model = TiedLSTMForSequenceClassification.from_pretrained(source, **changes)
    return model, AutoTokenizer.from_pretrained(source)


def _training_arguments(record: Stage, args: Any) -> TrainingArguments:
    return TrainingArguments(
        record.checkpoints,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=64,
        train_sampling_strategy="group_by_length",
        **trainer_settings(args),
    )


def _training_texts(stage: ClassifierStage, teacher: dict | None) -> tuple[list[str], torch.Tensor]:
    """The texts to train on, and their labels as shares of the classes."""
    data, args = stage.data, stage.args
    texts, true = data.splits["train"][0], data.targets("train")
    classes = len(data.classes)
    soft = true if data.several else torch.nn.functional.one_hot(true, classes).float()
    if teacher is not None and args.self_distillation:
        logits = teacher["train"] / teacher["temperature"]
        soft = (logits.sigmoid() + true) / 2 if data.several else distillation_labels(logits, true)
    if teacher is not None and args.pseudo_labels is not None:
        logits = teacher["unlabeled"] / teacher["temperature"]
        if data.several:  # a text of which every class is sure
            sure = (logits.sigmoid() - 0.5).abs().min(dim=1).values + 0.5 >= args.pseudo_labels
            chosen, labels = sure.nonzero().flatten(), (logits[sure] > 0).float()
        else:
            chosen, numbers = pseudo_labels(logits.softmax(dim=1), args.pseudo_labels)
            labels = torch.nn.functional.one_hot(numbers, classes).float()
        texts = [*texts, *(data.unlabeled[row] for row in chosen.tolist())]
        soft = torch.cat([soft, labels])
    share = args.label_smoothing
    return texts, soft * (1 - share) + share / (2 if data.several else classes)


def _rows(
    texts: list[str], targets: torch.Tensor | None, tokenizer: PreTrainedTokenizerBase, data_args: Any
) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """The pieces of all texts as rows of a dataset, and the number of each piece's text."""
    ids, owners = pieces(texts, tokenizer, data_args.chunk, data_args.overlap)
    rows = [{"input_ids": row} for row in ids]
    if targets is not None:
        rows = [row | {"labels": targets[owner].tolist()} for row, owner in zip(rows, owners, strict=True)]
    return rows, torch.tensor(owners)


def _predict(
    trainer: Trainer, texts: list[str], tokenizer: PreTrainedTokenizerBase, stage: ClassifierStage
) -> torch.Tensor:
    """The logits of each text, (texts, classes): the mean or the maximum over its pieces."""
    rows, owners = _rows(texts, None, tokenizer, stage.data_args)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))  # little padding
    found = torch.as_tensor(trainer.predict([rows[row] for row in order]).predictions)
    logits = torch.empty_like(found)
    logits[torch.tensor(order)] = found
    parts = logits.split(torch.bincount(owners).tolist())
    return torch.stack([part.amax(0) if stage.data_args.chunk_pooling == "max" else part.mean(0) for part in parts])
