r"""Train or fine-tune a translation model on your sentence pairs, tied as you say, and measure its BLEU and chrF.

From scratch, with one vocabulary for both languages trained on the same text; then go on after a stop:

    python examples/run_translation.py --model_type marian --scheme three_way --do_train --do_eval \
        --train_source_file train.en --train_target_file train.de --validation_source_file val.en \
        --validation_target_file val.de --predict_with_generate --num_beams 4 --label_smoothing_factor 0.1 \
        --max_steps 2000 --learning_rate 1e-3 --output_dir runs/mine --config_overrides \
        d_model=256,encoder_layers=3,decoder_layers=3,encoder_attention_heads=4,decoder_attention_heads=4
    (the same) --resume_from_checkpoint last

A saved or published model, on JSON lines {"translation": {"en": "...", "de": "..."}}, on one GPU or on several; flags
may stand in one JSON or YAML file, and a flag beside it overrides it:

    python examples/run_translation.py --model_name_or_path google-t5/t5-small --do_train --output_dir runs/tuned \
        --source_prefix "translate English to German: " --source_lang en --target_lang de --train_file train.json
    python examples/run_translation.py --model_name_or_path facebook/nllb-200-distilled-600M --source_lang eng_Latn \
        --target_lang deu_Latn --test_file test.json --do_predict --predict_with_generate --output_dir runs/nllb
    python examples/run_translation.py --model_name_or_path runs/tuned --source_lang en --target_lang de --do_predict \
        --predict_with_generate --test_source_file only_the_source.en --output_dir runs/translated
    torchrun --nproc_per_node 4 examples/run_translation.py mine.yaml --learning_rate 1e-4

Without --scheme and --groups_file the model is tied, or not, as its own config says.
"""

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from hf_tying import TyingError, tie
from hf_tying.data.parallel import ParallelCorpus, encode_parallel, read_parallel_text, read_translation_json
from hf_tying.data.tokenizers import joint_tokenizer
from hf_tying.metrics import Bleu, ChrF, generated_text, translation_metrics
from hf_tying.training import (
    ScriptParser,
    TyingArguments,
    config_with_overrides,
    resume_path,
    set_accepts_loss_kwargs,
)
from hf_tying.training.command_line import naming
from hf_tying.training.model_config import maker_from
from hf_tying.training.resuming import save_whole_model, ties_as_saved, train_from, vocabulary_as_saved
from hf_tying.training.seeded_order import SeededOrder
from hf_tying.training.size_estimate import estimate_size, without_values
from hf_tying.training.translation import (
    TwoTokenizersCallback,
    check_fit,
    fill_special_ids,
    freeze_what_no_file_keeps,
    rows_needed,
    special_ids,
    target_tokenizer_beside,
    translation_collator,
    translation_config,
    use_languages,
)


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str | None = field(default=None, metadata={"help": "A saved model, or its id on the Hub."})
    model_type: str | None = field(default=None, metadata={"help": "From scratch: the type, such as marian or t5."})
    config_name: str | None = field(
        default=None, metadata={"help": "From scratch: a config in a folder or on the Hub, not a type's default."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "From scratch: changes to that config, as name=value,name=value; lists are JSON."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the model's."})
    target_tokenizer_name: str | None = field(default=None, metadata={"help": "The target side's, if it has its own."})
    vocab_size: int = field(
        default=8192, metadata={"help": "From scratch without --tokenizer_name: entries of the joint vocabulary."}
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


@dataclass
class DataTrainingArguments:
    _argument_group_name = "sentence pairs"

    source_lang: str | None = field(default=None, metadata={"help": "Source language: en, or a tokenizer's en_XX."})
    target_lang: str | None = field(default=None, metadata={"help": "Target language: de, or a tokenizer's de_DE."})
    train_file: str | None = field(default=None, metadata={"help": "Training pairs as JSON lines."})
    train_source_file: str | None = field(default=None, metadata={"help": "Or as text, a sentence per line: a.en"})
    train_target_file: str | None = field(default=None, metadata={"help": "and its translation, line by line: a.de."})
    validation_file: str | None = field(default=None, metadata={"help": "Pairs for --do_eval, likewise."})
    validation_source_file: str | None = field(default=None, metadata={"help": "Or as text."})
    validation_target_file: str | None = field(default=None, metadata={"help": "Its translation."})
    test_file: str | None = field(default=None, metadata={"help": "Pairs for --do_predict, or the sources alone."})
    test_source_file: str | None = field(default=None, metadata={"help": "Or as text."})
    test_target_file: str | None = field(default=None, metadata={"help": "Its translation, if there is one."})
    source_prefix: str = field(default="", metadata={"help": "Put before each source sentence, as T5 wants it."})
    max_source_length: int = field(default=128, metadata={"help": "Tokens of a source sentence at most."})
    max_target_length: int = field(default=128, metadata={"help": "Tokens of a target sentence at most."})
    num_beams: int | None = field(default=None, metadata={"help": "The same as --generation_num_beams."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Take only the first pairs."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Take only the first pairs."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Take only the first pairs."})


def read_split(args: DataTrainingArguments, split: str, limit: int | None, needed: bool) -> ParallelCorpus | None:
    """The pairs of a split, from one JSON file or two text files; `None` if no file is given."""
    json, source, target = (getattr(args, f"{split}_{name}") for name in ("file", "source_file", "target_file"))
    languages = (args.source_lang, args.target_lang)
    both = (source is None) == (target is None) or (split == "test" and target is None)
    if not both or (json and source) or (needed and not json and not source):
        raise TyingError(f"Expected --{split}_file, or both --{split}_source_file and --{split}_target_file.")
    if json and None in languages:
        raise TyingError(f"--{split}_file has sentences by language: say which with --source_lang and --target_lang.")
    if json:
        needs_target = split != "test"
        try:
            corpus = read_translation_json(json, *languages, needs_target)
        except TyingError:  # mBART's en_XX and NLLB's eng_Latn may stand as en and eng in the file
            short = (language.split("_")[0] for language in languages)
            corpus = read_translation_json(json, *short, needs_target)
    elif source:
        corpus = read_parallel_text(source, target, *languages)
    else:
        return None
    sources = [args.source_prefix + sentence for sentence in corpus.source[:limit]]
    return replace(corpus, source=sources, target=corpus.target and corpus.target[:limit])


def tokenizer_at(flag: str, name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """A saved tokenizer."""
    with naming(f"{flag} {name}"):
        return AutoTokenizer.from_pretrained(name, **kwargs)


def load(
    args: ModelArguments, tying: TyingArguments
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """A saved model and the tokenizers of its two sides, which most often are one."""
    name, declared = args.model_name_or_path, tying.to_tying_config()
    if args.tokenizer_name:
        tokenizer = tokenizer_at("--tokenizer_name", args.tokenizer_name)
    else:
        tokenizer = tokenizer_at("--model_name_or_path", name, revision=args.model_revision)
    if args.target_tokenizer_name:
        target = tokenizer_at("--target_tokenizer_name", args.target_tokenizer_name)
    else:
        target = target_tokenizer_beside(name) or tokenizer
    with naming(f"--model_name_or_path {name}"):
        model = AutoModelForSeq2SeqLM.from_pretrained(name, revision=args.model_revision, dtype=args.dtype)
    freeze_what_no_file_keeps(model)
    if declared:
        tie(model, declared, init_from=tying.init_from, tokenizer=tokenizer, target_tokenizer=target)
    return model, tokenizer, target


def config_of(
    args: ModelArguments, tokenizer: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    """The config of a model from scratch: of a type or a file, with the tokenizers' sizes and special ids."""
    if args.config_name is None:
        make = partial(translation_config, args.model_type, tokenizer, target)
    else:
        config = AutoConfig.from_pretrained(args.config_name, revision=args.model_revision)
        told = special_ids(target) | {"vocab_size": rows_needed(tokenizer), "decoder_vocab_size": rows_needed(target)}
        make = partial(maker_from(config), **{name: value for name, value in told.items() if hasattr(config, name)})
    return config_with_overrides(make, args.config_overrides)


def from_scratch(
    args: ModelArguments,
    tying: TyingArguments,
    corpus: ParallelCorpus | None,
    lengths: tuple[int, int],
    training: Seq2SeqTrainingArguments,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """A tied model with a joint vocabulary of the training pairs, or for one or two tokenizers that there are."""
    declared = tying.to_tying_config()
    if args.tokenizer_name:
        tokenizer = target = tokenizer_at("--tokenizer_name", args.tokenizer_name)
        if args.target_tokenizer_name:
            target = tokenizer_at("--target_tokenizer_name", args.target_tokenizer_name)
    elif corpus is None:
        raise TyingError("A model from scratch needs training pairs to make its vocabulary, or --tokenizer_name.")
    else:
        languages = dict.fromkeys((corpus.source_language, corpus.target_language))
        lines = [*corpus.source, *corpus.target]
        tokenizer = target = joint_tokenizer(lines, args.vocab_size, list(languages), not training.disable_tqdm)
    with naming(f"--config_name {args.config_name}" if args.config_name else "--model_type or --config_overrides"):
        config = config_of(args, tokenizer, target)
        if declared:
            config.tying = declared.to_dict()  # nothing is trained yet, so there is no choice of values to make
        model = without_values(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, config)
        estimate_size(model, training.per_device_train_batch_size, max(lengths)).refuse_beyond(
            psutil.virtual_memory().available
        )
        model = AutoModelForSeq2SeqLM.from_config(config)
    if declared:
        tie(model, declared, tokenizer=tokenizer, target_tokenizer=target)  # made already: this compares vocabularies
    return model, tokenizer, target


class OrderedTrainer(Seq2SeqTrainer):
    """Evaluates and predicts each row once, in its order, also in several processes or after grouping by length."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        sampler = super()._get_train_sampler(*args, **kwargs)
        # The order of an epoch does not depend on a stop before it.
        return SeededOrder(sampler, self) if self.args.train_sampling_strategy == "group_by_length" else sampler

    def _get_eval_sampler(self, eval_dataset: Dataset) -> None:
        return None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        # Several processes have as many rows each, the first ones once more at the end. Seq2SeqTrainer keeps those.
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)


def translate(
    trainer: Seq2SeqTrainer, corpus: ParallelCorpus, encoded: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write `generated_predictions.txt`, a line for each sentence, and scores against the whole references, if any."""
    if corpus.target is not None:
        trainer.compute_metrics = translation_metrics(tokenizer, corpus.target_language, references=corpus.target)
    output = trainer.predict(encoded, metric_key_prefix="predict")
    if not trainer.is_world_process_zero():
        return
    sentences = generated_text(output.predictions, tokenizer)
    lines = "".join(" ".join(sentence.split()) + "\n" for sentence in sentences)
    Path(trainer.args.output_dir, "generated_predictions.txt").write_text(lines, encoding="utf-8")
    metrics = dict(output.metrics)
    if corpus.target is not None:
        texts = dict(predictions=sentences, references=corpus.target, bootstrap=1000)
        bleu = Bleu(keep_in_memory=True).compute(**texts, trg_lang=corpus.target_language)
        chrf = ChrF(keep_in_memory=True).compute(**texts)
        metrics |= {"predict_bleu": bleu["score"], "predict_chrf": chrf["score"]}
        for key in ("confidence", "signature"):
            metrics |= {f"predict_bleu_{key}": bleu[key], f"predict_chrf_{key}": chrf[key]}
    trainer.log_metrics("predict", metrics)
    trainer.save_metrics("predict", metrics)


def main() -> None:
    """Do what the command line says."""
    classes = (ModelArguments, DataTrainingArguments, Seq2SeqTrainingArguments, TyingArguments)
    model_args, data_args, args, tying_args = ScriptParser(classes, description=__doc__).parse()
    if not (args.do_train or args.do_eval or args.do_predict):
        raise TyingError("Nothing to do: give --do_train, --do_eval, --do_predict, or several of them.")
    if args.resume_from_checkpoint and not args.do_train:
        raise TyingError(
            "--resume_from_checkpoint goes on with a training: add --do_train, or --model_name_or_path CHECKPOINT."
        )
    if args.do_predict and not args.predict_with_generate:
        raise TyingError("--do_predict writes translations, so it needs --predict_with_generate.")
    checkpoint = resume_path(args) if args.do_train else None
    callbacks = [tying_args.to_callback()]
    tying_args.to_tying_config()  # what is wrong with it is said before any work

    train = read_split(data_args, "train", data_args.max_train_samples, args.do_train)
    validation = read_split(data_args, "validation", data_args.max_eval_samples, args.do_eval)
    test = read_split(data_args, "test", data_args.max_predict_samples, args.do_predict)
    lengths = data_args.max_source_length, data_args.max_target_length
    set_seed(args.seed)
    if model_args.model_name_or_path:
        model, tokenizer, target = load(model_args, tying_args)
    else:
        model, tokenizer, target = from_scratch(model_args, tying_args, train, lengths, args)
    use_languages(model, tokenizer, data_args.source_lang, data_args.target_lang)
    fill_special_ids(model, target)

    if checkpoint:
        vocabulary_as_saved(tokenizer, checkpoint)
        ties_as_saved(model, checkpoint, tying_args.untie_at)
    check_fit(model, tokenizer, target, *lengths)
    corpora = (train, validation, test)
    encoded = [corpus and encode_parallel(corpus, tokenizer, target, *lengths) for corpus in corpora]
    with naming("BLEU"):  # said now, and not after an epoch
        language = next((corpus.target_language for corpus in corpora if corpus), None)
        metrics = translation_metrics(target, language, references=validation and validation.target)
    args.generation_num_beams = data_args.num_beams or args.generation_num_beams
    args.generation_max_length = args.generation_max_length or data_args.max_target_length
    generation = model.generation_config
    generation.max_length = generation.max_length or args.generation_max_length
    generation.num_beams = args.generation_num_beams or generation.num_beams
    if target is not tokenizer:
        callbacks.insert(0, TwoTokenizersCallback(tokenizer, target))  # a checkpoint is sealed when they are in it
    trainer = OrderedTrainer(
        model=set_accepts_loss_kwargs(model),
        args=args,
        train_dataset=encoded[0],
        eval_dataset=encoded[1],
        processing_class=tokenizer if target is tokenizer else None,
        data_collator=translation_collator(model, tokenizer, pad_to_multiple_of=8 if args.fp16 or args.bf16 else None),
        compute_metrics=metrics if args.predict_with_generate else None,
        callbacks=callbacks,
    )
    if args.do_train:
        if args.should_log:
            print(estimate_size(model, args.per_device_train_batch_size, max(lengths)), flush=True)
        result = train_from(trainer, checkpoint)
        save_whole_model(trainer)
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if args.do_predict:
        translate(trainer, test, encoded[2], target)
    if args.push_to_hub:
        trainer.push_to_hub(
            finetuned_from=model_args.model_name_or_path, tags=["translation", "weight-tying", "hf_tying"]
        )


if __name__ == "__main__":
    try:
        main()
    except TyingError as error:
        sys.exit(f"error: {error}")
