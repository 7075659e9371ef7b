"""The first two stages of `run_ulmfit.py`: a language model of general text, then of the task's own texts."""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from ulmfit_data import Data
from ulmfit_stage import Stage, digest, optimizers, trainer_settings

from hf_tying import TyingCallback, TyingError
from hf_tying.data import ContiguousText, extend_vocabulary, train_word_tokenizer
from hf_tying.models import TiedLSTMConfig, TiedLSTMForCausalLM
from hf_tying.models.lstm.sizes import SIZES
from hf_tying.training import CarriedStateArguments, CarriedStateTrainer, train_from
from hf_tying.training.command_line import naming

#: Share of a text's words, at its end, that the perplexity is measured on.
HELD_OUT = 0.05


def pretrain(folder: Path, data: Data, data_args: Any, model_args: Any, args: Any, backward: bool) -> Stage:
    """Stage 1: a language model of general text. With --no_pretrain, initial values and the words of the task."""
    if data_args.pretrained_lm and not args.no_pretrain:
        source = Path(data_args.pretrained_lm)
        return _copied(source.with_name(f"{source.name}_backward") if backward else source, folder)
    texts = task_texts(data) if args.no_pretrain else data.pretrain
    names = ("embedding_size", "hidden_size", "num_layers", "dropout", "no_tying")
    settings = {name: getattr(model_args, name) for name in names}
    settings |= {name: getattr(data_args, name) for name in ("vocab_size", "min_frequency", "lowercase")}
    settings |= {"text": digest(texts), "backward": backward, "seed": args.seed, "no_pretrain": args.no_pretrain}
    if not args.no_pretrain:
        settings |= _training_settings(args, args.pretrain_epochs, args.pretrain_learning_rate)
    stage = Stage(folder, settings)
    if stage.finished:
        return stage
    set_seed(args.seed)
    tokenizer = _tokenizer(texts, data_args)
    model = TiedLSTMForCausalLM(_config(model_args, tokenizer, backward))
    if args.no_pretrain:
        _save(stage, model, tokenizer)
    else:
        _train(stage, model, tokenizer, texts, args, args.pretrain_epochs, args.pretrain_learning_rate, False)
    return stage


def tune(folder: Path, lm: Stage, data: Data, data_args: Any, args: Any, backward: bool) -> Stage:
    """Stage 2: the language model learns the words and the language of the task's texts."""
    texts = task_texts(data)
    settings = {"lm": digest(lm.settings), "text": digest(texts), "no_lm_tuning": args.no_lm_tuning, "seed": args.seed}
    if not args.no_lm_tuning:
        settings |= _training_settings(args, args.tune_epochs, args.tune_learning_rate)
        settings["no_discriminative_rates"] = args.no_discriminative_rates
    stage = Stage(folder, settings)
    if stage.finished:
        return stage
    model = TiedLSTMForCausalLM.from_pretrained(lm.folder)
    tokenizer = AutoTokenizer.from_pretrained(lm.folder)
    known = len(tokenizer)
    tokenizer = extend_vocabulary(model, tokenizer, _tokenizer(texts, data_args))
    if args.no_lm_tuning:
        _save(stage, model, tokenizer, new_words=len(tokenizer) - known)
    else:
        new = {"new_words": len(tokenizer) - known}
        _train(stage, model, tokenizer, texts, args, args.tune_epochs, args.tune_learning_rate, True, **new)
    return stage


def _copied(source: Path, folder: Path) -> Stage:
    """The first stage of another run."""
    if not (source / "config.json").is_file():
        raise TyingError(f"--pretrained_lm: {str(source)!r} has no config.json. Expected a language model's folder.")
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(source.glob("*.safetensors"))}
    stage = Stage(folder, {"pretrained_lm": files})
    if not stage.finished:
        with naming(f"--pretrained_lm {source}"):
            model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        if not isinstance(model, TiedLSTMForCausalLM):
            raise TyingError(f"--pretrained_lm {source} is a {type(model).__name__}: expected a TiedLSTMForCausalLM.")
        _save(stage, model, tokenizer, words=len(tokenizer))
    return stage


def task_texts(data: Data) -> list[str]:
    """The task's texts that may be read without their labels: those for training, and those that have none."""
    return [*data.splits["train"][0], *data.unlabeled]


def _tokenizer(texts: list[str], data_args: Any) -> PreTrainedTokenizerBase:
    options = {"vocab_size": data_args.vocab_size, "lowercase": data_args.lowercase}
    try:
        return train_word_tokenizer(texts, min_frequency=data_args.min_frequency, **options)
    except TyingError:  # a few texts without a word that occurs twice
        return train_word_tokenizer(texts, **options)


def _config(args: Any, tokenizer: PreTrainedTokenizerBase, backward: bool) -> TiedLSTMConfig:
    rates = {name: value * args.dropout for name, value in SIZES["awd"].items() if name.endswith("_dropout")}
    return TiedLSTMConfig.named(
        "awd",
        vocab_size=len(tokenizer),
        embedding_size=args.embedding_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        tie_word_embeddings=not args.no_tying,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        reads_backward=backward,
        **rates,
    )


def _training_settings(args: Any, epochs: float, learning_rate: float) -> dict[str, Any]:
    names = ("lm_batch_size", "bptt", "weight_decay", "no_slanted_triangular")
    return {name: getattr(args, name) for name in names} | {"epochs": epochs, "learning_rate": learning_rate}


def _train(
    stage: Stage,
    model: TiedLSTMForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    args: Any,
    epochs: float,
    learning_rate: float,
    discriminative: bool,
    **figures: Any,
) -> None:
    ids = torch.tensor([tokenizer.eos_token_id, *(id for row in tokenizer(texts)["input_ids"] for id in row)])
    ids = ids.flip(0) if model.config.reads_backward else ids
    held_out = max(2, int(len(ids) * HELD_OUT))
    if len(ids) < held_out + 4:
        raise TyingError(f"The text of {stage.folder.name!r} has {len(ids)} words, too few to learn from.")
    train, validation = ids[:-held_out], ids[-held_out:]
    # A short text has fewer columns, and shorter ones.
    columns = max(1, min(args.lm_batch_size, len(train) // (2 * args.bptt + 1)))
    text = ContiguousText(train, columns, min(args.bptt, len(train) // columns - 1))
    training = CarriedStateArguments(
        stage.checkpoints,
        num_train_epochs=epochs,
        per_device_train_batch_size=columns,
        sum_over_time=False,
        eval_strategy="epoch",
        **trainer_settings(args),
    )
    steps = math.ceil(text.pieces * epochs)
    trainer = CarriedStateTrainer(
        model,
        training,
        train_dataset=text,
        eval_dataset=validation,
        processing_class=tokenizer,
        optimizers=optimizers(model, args, learning_rate, steps, discriminative),
        callbacks=[TyingCallback()],
    )
    train_from(trainer, stage.last_checkpoint())
    perplexity = trainer.evaluate()["eval_perplexity"]
    _save(stage, model, tokenizer, perplexity=perplexity, words=len(tokenizer), **figures)


def _save(stage: Stage, model: TiedLSTMForCausalLM, tokenizer: PreTrainedTokenizerBase, **figures: Any) -> None:
    model.save_pretrained(stage.folder)
    tokenizer.save_pretrained(stage.folder)
    stage.finish(**figures)
