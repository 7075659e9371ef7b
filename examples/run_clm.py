"""Train or fine-tune a causal language model on your text, tied as you say, and measure its perplexity.

From scratch, with a tokenizer trained on the same text; then go on after a stop:

    python examples/run_clm.py --model_type llama --scheme two_way --do_train --do_eval --output_dir runs/mine \
        --train_file train.txt --validation_file valid.txt --max_steps 1000 --learning_rate 2e-3 --config_overrides \
        hidden_size=256,intermediate_size=768,num_hidden_layers=4,num_attention_heads=4,num_key_value_heads=4
    (the same) --resume_from_checkpoint runs/mine/checkpoint-500

A saved or published model, on one GPU, on several, or on the CPU; flags may stand in one JSON or YAML file:

    python examples/run_clm.py --model_name_or_path gpt2 --train_file train.txt --do_train --output_dir runs/tuned
    torchrun --nproc_per_node 4 examples/run_clm.py mine.yaml     (or: accelerate launch examples/run_clm.py mine.yaml)
    python examples/run_clm.py --use_cpu --model_name_or_path gpt2 --train_file a.txt --do_train --output_dir runs/y

Without --scheme and --groups_file the model is tied, or not, as its own config says. --objective al trains by the
augmented loss, --untie_at 0.67 unties after two thirds of the steps, --freeze output leaves the softmax as it is.
"""

import sys
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from datasets import DatasetDict, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_tying import TyingError, tie, use_tied_loss
from hf_tying.data import train_byte_level_bpe
from hf_tying.metrics import perplexity_of, sequence_scores
from hf_tying.training import ObjectiveArguments, TyingArguments, config_with_overrides, set_accepts_loss_kwargs


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "A saved model, or its id on the Hub."})
    model_type: str | None = field(default=None, metadata={"help": "From scratch: the type, such as llama or gpt2."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "From scratch: changes to the type's default config, as name=value,name=value."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the model's."})
    vocab_size: int = field(
        default=8192,
        metadata={"help": "From scratch without --tokenizer_name: entries of the BPE trained on the training text."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "Of a loaded model: auto, float32, bfloat16 or float16."})

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.model_type is None):
            raise TyingError("Expected one of --model_name_or_path (load) and --model_type (from scratch).")


@dataclass
class DataTrainingArguments:
    train_file: str | None = field(default=None, metadata={"help": "Training text: .txt, .json (lines) or .csv."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation text, of the same form."})
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hub in place of files."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Without validation text: the share of the training text, at its end, held out."}
    )
    block_size: int = field(default=512, metadata={"help": "Tokens in a training sequence."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})

    def __post_init__(self):
        if (self.dataset_name is None) == (self.train_file is None):
            raise TyingError("Expected one of --train_file and --dataset_name.")


def load_text(args: DataTrainingArguments) -> tuple[DatasetDict, str]:
    """`train` and `validation`, and the name of the column that has the text."""
    if args.dataset_name:
        data = load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        files = {"train": args.train_file, "validation": args.validation_file}
        files = {split: name for split, name in files.items() if name}
        for name in files.values():
            if not Path(name).is_file():
                raise TyingError(f"There is no file {name!r}. Expected text in a .txt, .json or .csv file.")
        suffix = Path(args.train_file).suffix.lstrip(".")
        form = {"txt": "text", "jsonl": "json"}.get(suffix, suffix)
        data = load_dataset(form, data_files=files, **({"keep_linebreaks": True} if form == "text" else {}))
    if "validation" not in data:
        held_out = data["train"].train_test_split(args.validation_split_percentage / 100, shuffle=False)
        data = DatasetDict(train=held_out["train"], validation=held_out["test"])
    columns = data["train"].column_names
    return data, "text" if "text" in columns else columns[0]


def cut_into_blocks(data: DatasetDict, column: str, tokenizer, args: DataTrainingArguments) -> DatasetDict:
    """Tokenize, join, and cut into `(blocks, block_size)`; less than a block in a thousand rows is dropped."""

    def cut(rows):
        tokens = list(chain.from_iterable(tokenizer(rows[column], return_attention_mask=False)["input_ids"]))
        ends = range(args.block_size, len(tokens) + 1, args.block_size)
        blocks = [tokens[end - args.block_size : end] for end in ends]
        return {"input_ids": blocks, "labels": blocks}

    columns, processes = data["train"].column_names, args.preprocessing_num_workers
    data = data.map(cut, batched=True, remove_columns=columns, num_proc=processes, desc=f"Blocks of {args.block_size}")
    for split in ("train", "validation"):
        if not len(data[split]):
            raise TyingError(
                f"The {split} text is shorter than one block of {args.block_size} tokens: see --block_size."
            )
    return data


def make_model_and_tokenizer(args: ModelArguments, tying: TyingArguments, texts):
    """A tied model and its tokenizer, loaded or from scratch."""
    declared = tying.to_tying_config()
    if args.model_name_or_path:
        source = args.tokenizer_name or args.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(source, revision=args.model_revision)
        model = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, revision=args.model_revision, dtype=args.dtype
        )
        return (tie(model, declared, init_from=tying.init_from) if declared else model), tokenizer

    if args.tokenizer_name:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
    else:
        tokenizer = train_byte_level_bpe(texts, args.vocab_size)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    fields = {"vocab_size": len(tokenizer), "pad_token_id": None} | special
    config = config_with_overrides(
        lambda **changes: AutoConfig.for_model(args.model_type, **fields | changes), args.config_overrides
    )
    if declared:
        config.tying = declared.to_dict()  # nothing is trained yet, so there is no choice of values to make
    return AutoModelForCausalLM.from_config(config), tokenizer


def main():
    parser = HfArgumentParser(
        (ModelArguments, DataTrainingArguments, TrainingArguments, TyingArguments, ObjectiveArguments)
    )
    file = Path(sys.argv[1]) if len(sys.argv) == 2 else Path()
    if file.suffix == ".json":
        arguments = parser.parse_json_file(file)
    elif file.suffix in (".yaml", ".yml"):
        arguments = parser.parse_yaml_file(file)
    else:
        arguments = parser.parse_args_into_dataclasses()
    model_args, data_args, training_args, tying_args, objective_args = arguments

    set_seed(training_args.seed)
    data, column = load_text(data_args)
    model, tokenizer = make_model_and_tokenizer(model_args, tying_args, data["train"][column])
    if (objective := objective_args.to_objective()) is not None:
        use_tied_loss(model, objective=objective)
    set_accepts_loss_kwargs(model)
    with training_args.main_process_first(desc="tokenizing"):
        blocks = cut_into_blocks(data, column, tokenizer, data_args)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        preprocess_logits_for_metrics=sequence_scores,
        compute_metrics=perplexity_of,
        callbacks=[tying_args.to_callback()],
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.push_to_hub:
        trainer.push_to_hub(finetuned_from=model_args.model_name_or_path, tags=["weight-tying", "hf_tying"])


if __name__ == "__main__":
    try:
        main()
    except TyingError as error:
        sys.exit(f"error: {error}")
