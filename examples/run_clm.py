r"""Train or fine-tune a causal language model on your text, tied as you say, and measure its perplexity.

From scratch, with a tokenizer trained on the same text; then go on after a stop:

    python examples/run_clm.py --model_type llama --scheme two_way --do_train --do_eval --output_dir runs/mine \
        --train_file train.txt --validation_file valid.txt --max_steps 1000 --learning_rate 2e-3 --config_overrides \
        hidden_size=256,intermediate_size=768,num_hidden_layers=4,num_attention_heads=4,num_key_value_heads=4
    (the same) --resume_from_checkpoint last

A saved or published model, on one GPU, on several, or on the CPU; flags may stand in one JSON or YAML file:

    python examples/run_clm.py --model_name_or_path gpt2 --train_file train.txt --do_train --output_dir runs/tuned
    python examples/run_clm.py --model_name_or_path runs/tuned --validation_file b.txt --do_eval --output_dir runs/x
    torchrun --nproc_per_node 4 examples/run_clm.py mine.yaml     (or: accelerate launch examples/run_clm.py mine.yaml)
    python examples/run_clm.py mine.yaml --learning_rate 1e-4     (a flag beside a file overrides it)
    python examples/run_clm.py --use_cpu --model_name_or_path gpt2 --train_file a.txt --do_train --output_dir runs/y

Without --scheme and --groups_file the model is tied, or not, as its own config says. --objective al trains by the
augmented loss, --untie_at 0.67 unties after two thirds of the steps, --freeze output leaves the softmax as it is.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
from datasets import Dataset, IterableDataset
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_tying import TyingConfig, TyingError, tie, use_tied_loss
from hf_tying.data import train_byte_level_bpe
from hf_tying.data.text_datasets import (
    TextSplit,
    hold_out,
    naming_unreadable_rows,
    read_text_dataset,
    read_text_file,
    token_blocks,
)
from hf_tying.metrics import perplexity_of, sequence_scores
from hf_tying.training import ObjectiveArguments, ScriptParser, TyingArguments, resume_path, set_accepts_loss_kwargs
from hf_tying.training.command_line import naming
from hf_tying.training.model_config import config_with_overrides, maker_from, refuse_positions, type_config
from hf_tying.training.resuming import save_whole_model, ties_as_saved, train_from, vocabulary_as_saved
from hf_tying.training.size_estimate import estimate_size, without_values


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str | None = field(default=None, metadata={"help": "A saved model, or its id on the Hub."})
    model_type: str | None = field(default=None, metadata={"help": "From scratch: the type, such as llama or gpt2."})
    config_name: str | None = field(
        default=None,
        metadata={"help": "From scratch: a config in a folder or on the Hub, not a type's default."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "From scratch: changes to that config, as name=value,name=value; lists are JSON."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the model's."})
    vocab_size: int = field(
        default=8192,
        metadata={"help": "From scratch without --tokenizer_name: entries of the BPE trained on the training text."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "Of a loaded model: auto, float32, bfloat16 or float16."})

    def __post_init__(self) -> None:
        sources = (self.model_name_or_path, self.model_type, self.config_name)
        if sum(source is not None for source in sources) != 1:
            raise TyingError(
                "Expected one of --model_name_or_path (load), --model_type and --config_name (from scratch)."
            )
        if self.model_name_or_path and self.config_overrides:
            raise TyingError("--config_overrides is for a model from scratch: a saved one has its own config.")

    @property
    def trains_tokenizer(self) -> bool:
        """Whether the vocabulary is made of the training text."""
        return self.model_name_or_path is None and self.tokenizer_name is None


@dataclass
class DataTrainingArguments:
    _argument_group_name = "text"

    train_file: str | None = field(
        default=None,
        metadata={"help": "Training text: .txt, .json, .jsonl, .csv, or a save_to_disk folder."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "Validation text, of any of these forms."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "In place of files: a dataset on the Hub, or a save_to_disk folder."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    text_column: str = field(default="text", metadata={"help": "The column of the text; each row is a document."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the text while training, for text larger than memory and disk."}
    )
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Without validation text: the share of the training text, at its end, held out."}
    )
    block_size: int = field(default=512, metadata={"help": "Tokens in a training sequence."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Take only the first sequences."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Take only the first sequences."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_file is None and self.validation_file is None):
            raise TyingError("Expected --train_file or --validation_file (or both), or else --dataset_name.")
        if self.block_size < 2:
            raise TyingError(f"--block_size {self.block_size}: expected 2 or more, a token and the next one.")


def read_text(
    args: DataTrainingArguments, needs_train: bool, needs_validation: bool
) -> tuple[TextSplit | None, TextSplit | None]:
    """The training and the validation text, as far as they are needed."""
    if args.dataset_name:
        splits = read_text_dataset(args.dataset_name, args.dataset_config_name, args.text_column, args.streaming)
        train, validation = splits.get("train"), splits.get("validation")
        if train is None and (needs_train or validation is None):
            raise TyingError(f"The dataset {args.dataset_name!r} has no split 'train'; it has {', '.join(splits)}.")
    else:
        options = {"column": args.text_column, "streaming": args.streaming}
        holds_out = needs_validation and not args.validation_file
        train = validation = None
        if args.train_file and (needs_train or holds_out):
            train = read_text_file("train", args.train_file, **options)
        if args.validation_file and needs_validation:
            validation = read_text_file("validation", args.validation_file, **options)
        if needs_train and train is None:
            raise TyingError("Training, and a vocabulary of one's own, need --train_file or --dataset_name.")
    # Held out also where nothing is evaluated: a later run that evaluates finds text that was not trained on.
    if train is not None and validation is None and not args.validation_file:
        if not args.streaming or needs_validation:
            train, validation = hold_out(train, args.validation_split_percentage)
    return train, validation


def config_maker(args: ModelArguments, declared: TyingConfig | None) -> Callable[..., PreTrainedConfig]:
    """A function from the tokenizer's fields to the config of a model from scratch."""
    if args.config_name:
        with naming(f"--config_name {args.config_name}"):
            make = maker_from(AutoConfig.from_pretrained(args.config_name, revision=args.model_revision))
    else:

        def make(**fields: Any) -> PreTrainedConfig:
            return type_config(
                args.model_type, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **fields
            )

    def configured(**fields: Any) -> PreTrainedConfig:
        config = config_with_overrides(lambda **changes: make(**fields | changes), args.config_overrides)
        if declared:
            config.tying = declared.to_dict()  # nothing is trained yet, so there is no choice of values to make
        return config

    return configured


def load(args: ModelArguments, tying: TyingArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A saved model, tied as the flags say, and its tokenizer."""
    source = args.tokenizer_name or args.model_name_or_path
    with naming(f"--{'tokenizer_name' if args.tokenizer_name else 'model_name_or_path'} {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=args.model_revision)
    with naming(f"--model_name_or_path {args.model_name_or_path}"):
        model = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, revision=args.model_revision, dtype=args.dtype
        )
    declared = tying.to_tying_config()
    return (tie(model, declared, init_from=tying.init_from) if declared else model), tokenizer


def from_scratch(
    args: ModelArguments, tying: TyingArguments, train: TextSplit | None, block_size: int, training: TrainingArguments
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A tied model with a vocabulary of the training text, or for a tokenizer that there is."""
    make_config = config_maker(args, tying.to_tying_config())
    refuse_positions(make_config(vocab_size=args.vocab_size), block_size)  # before the vocabulary, which takes time
    if args.tokenizer_name:
        with naming(f"--tokenizer_name {args.tokenizer_name}"):
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
    else:
        tokenizer = train_byte_level_bpe(train.texts(), args.vocab_size, progress=not training.disable_tqdm)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    config = make_config(vocab_size=len(tokenizer), pad_token_id=None, **special)
    with naming(f"--model_type {config.model_type}"):
        model = without_values(MODEL_FOR_CAUSAL_LM_MAPPING, config)
        size = estimate_size(model, training.per_device_train_batch_size, block_size)
        size.refuse_beyond(psutil.virtual_memory().available)
        return AutoModelForCausalLM.from_config(config), tokenizer


def first(rows: Dataset | IterableDataset | None, count: int | None) -> Dataset | IterableDataset | None:
    """The first `count` rows; all for `None`."""
    if rows is None or count is None:
        return rows
    return rows.take(count) if isinstance(rows, IterableDataset) else rows.select(range(min(count, len(rows))))


def run(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    tying_args: TyingArguments,
    objective_args: ObjectiveArguments,
) -> None:
    """Train, evaluate, or both."""
    checkpoint = resume_path(training_args) if training_args.do_train else None
    objective, callback = objective_args.to_objective(), tying_args.to_callback()
    tying_args.to_tying_config()  # what is wrong with it is said before any work

    set_seed(training_args.seed)
    needs_train = training_args.do_train or model_args.trains_tokenizer
    needs_validation = training_args.do_eval or training_args.eval_strategy != "no"
    with training_args.main_process_first(desc="reading the text"):
        train, validation = read_text(data_args, needs_train, needs_validation)
    if model_args.model_name_or_path:
        model, tokenizer = load(model_args, tying_args)
        refuse_positions(model.config, data_args.block_size)
    else:
        model, tokenizer = from_scratch(model_args, tying_args, train, data_args.block_size, training_args)
    if checkpoint:
        vocabulary_as_saved(tokenizer, checkpoint)
        ties_as_saved(model, checkpoint, tying_args.untie_at)
    if objective is not None:
        use_tied_loss(model, objective=objective)
    set_accepts_loss_kwargs(model)
    with training_args.main_process_first(desc="tokenizing"):
        train_blocks, validation_blocks = (
            token_blocks(split, tokenizer, data_args.block_size, data_args.preprocessing_num_workers)
            if split is not None and needed
            else None
            for split, needed in ((train, training_args.do_train), (validation, needs_validation))
        )

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=first(train_blocks, data_args.max_train_samples),
        eval_dataset=first(validation_blocks, data_args.max_eval_samples),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        preprocess_logits_for_metrics=sequence_scores,
        compute_metrics=perplexity_of,
        callbacks=[callback],
    )
    if training_args.do_train:
        if training_args.should_log:
            size = estimate_size(model, training_args.per_device_train_batch_size, data_args.block_size)
            print(size, flush=True)
        result = train_from(trainer, checkpoint)
        save_whole_model(trainer)
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.push_to_hub:
        trainer.push_to_hub(finetuned_from=model_args.model_name_or_path, tags=["weight-tying", "hf_tying"])


def main() -> None:
    """Do what the command line says."""
    classes = (ModelArguments, DataTrainingArguments, TrainingArguments, TyingArguments, ObjectiveArguments)
    parser = ScriptParser(classes, description=__doc__)
    model_args, data_args, training_args, tying_args, objective_args = parser.parse()
    if not (training_args.do_train or training_args.do_eval):
        raise TyingError("Nothing to do: give --do_train, --do_eval, or both.")
    if training_args.resume_from_checkpoint and not training_args.do_train:
        raise TyingError(
            "--resume_from_checkpoint goes on with a training: add --do_train, or --model_name_or_path CHECKPOINT."
        )
    if training_args.do_predict:
        raise TyingError("--do_predict: this script measures perplexity by --do_eval and predicts nothing.")
    if training_args.do_train and data_args.streaming and training_args.max_steps <= 0:
        raise TyingError("A streamed text has no known length: give --max_steps.")
    with naming_unreadable_rows(data_args.train_file, data_args.validation_file):
        run(model_args, data_args, training_args, tying_args, objective_args)


if __name__ == "__main__":
    try:
        main()
    except TyingError as error:
        sys.exit(f"error: {error}")
