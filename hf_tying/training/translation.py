"""The settings that a translation model takes from its tokenizers before training, and the batches it trains on.

These are sizes, special ids, language codes and the decoder's inputs. A callback saves two tokenizers with the model.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from ..config import TyingError, nearest
from ..ties.anatomy import roles
from ..ties.sharding import shape_of
from ..ties.slots import find_parameter

#: The folder beside a model in which the second of two tokenizers is kept, that of the target side.
TARGET_TOKENIZER = "decoder_tokenizer"

# What a tokenizer has instead: a BERT begins with [CLS] and ends with [SEP], a GPT-2 has no padding.
_INSTEAD = {"bos_token_id": "cls_token_id", "eos_token_id": "sep_token_id", "pad_token_id": "eos_token_id"}


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """Read `bos_token_id`, `eos_token_id` and `pad_token_id` of a tokenizer.

    Where it has none, they are the ids of `[CLS]`, `[SEP]` and the end token.
    """
    ids = {name: getattr(tokenizer, name) for name in _INSTEAD}
    return {name: getattr(tokenizer, _INSTEAD[name]) if value is None else value for name, value in ids.items()}


def rows_needed(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of an embedding that a tokenizer needs: its vocabulary, and language codes beyond it (M2M100)."""
    ids = {*tokenizer.get_vocab().values(), *tokenizer.all_special_ids}
    ids |= {*getattr(tokenizer, "lang_token_to_id", {}).values(), *getattr(tokenizer, "lang_code_to_id", {}).values()}
    return max(len(tokenizer), max(ids) + 1)


def translation_config(
    model_type: str,
    tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase | None = None,
    **changes: Any,
) -> PreTrainedConfig:
    """Make the default config of a type of translation model, with the sizes and special ids of its tokenizers.

    The decoder starts with the padding (Marian, T5), the end (BART) or the beginning, as in the type's own default.
    Types that can scale their embedding (Marian, BART, M2M100) start with rows of unit norm, times the root of the
    width (Vaswani et al. 2017, section 3.4): with 0.02, attention stays flat for hundreds of steps in a small model.

    Args:
        model_type (`str`): type of the model, such as `"marian"`, `"bart"` or `"t5"`.
        tokenizer: tokenizer of the source side, and of the target side if it is the only one.
        target_tokenizer (*optional*): tokenizer of the target side. Marian then gets separate embeddings.
        **changes: further fields of the config.

    Raises:
        TyingError: if transformers does not have the type, if it is not an encoder-decoder, or if it has one
            vocabulary and there are two tokenizers.
    """
    if model_type not in CONFIG_MAPPING:
        raise TyingError(
            f"transformers has no model type {model_type!r}: expected such as marian, bart or t5"
            f"{nearest(model_type, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)}."
        )
    try:
        stock = AutoConfig.for_model(model_type)
    except ValueError:  # of transformers 5.17, where a model of two models has no default config
        stock = None
    if stock is None or not stock.is_encoder_decoder or hasattr(stock, "encoder"):
        raise TyingError(
            f"A model of type {model_type!r} is no translation model: expected such as marian, bart or t5."
        )
    target = target_tokenizer or tokenizer
    usual = ("vocab_size", "decoder_vocab_size")
    names = ("src_vocab_size", "tgt_vocab_size") if hasattr(stock, "tgt_vocab_size") else usual
    sizes = zip(names, map(rows_needed, (tokenizer, target)), strict=True)
    fields = {name: size for name, size in sizes if hasattr(stock, name)}
    fields |= special_ids(target)
    if target is not tokenizer:
        if names[1] not in fields:
            raise TyingError(f"A model of type {model_type!r} has one vocabulary, and there are two tokenizers.")
        if hasattr(stock, "share_encoder_decoder_embeddings"):
            fields["share_encoder_decoder_embeddings"] = False

    if hasattr(stock, "scale_embedding") and hasattr(stock, "init_std"):
        width = changes.get("d_model") or changes.get("hidden_size") or stock.d_model
        fields |= {"scale_embedding": True, "init_std": width**-0.5}
    start = getattr(stock, "decoder_start_token_id", None)
    as_in_stock = [name for name in _INSTEAD if start is not None and getattr(stock, name, None) == start]
    # Where the default does not say: T5, which has no beginning, starts with the padding; mBART with the labels' end.
    unsaid = "pad_token_id" if getattr(stock, "bos_token_id", None) is None else "eos_token_id"
    fields["decoder_start_token_id"] = fields[(as_in_stock or [unsaid])[0]]
    if getattr(stock, "forced_eos_token_id", None) is not None:
        fields["forced_eos_token_id"] = fields["eos_token_id"]
    return AutoConfig.for_model(model_type, **fields | changes)


def fill_special_ids(model: PreTrainedModel, target_tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the special ids that the configs of two joined models (`EncoderDecoderModel`) lack."""
    if not hasattr(model.config, "encoder"):
        return
    ids = special_ids(target_tokenizer)
    for part in (model.config, model.generation_config):
        for name, value in (ids | {"decoder_start_token_id": ids["bos_token_id"]}).items():
            if getattr(part, name, None) is None:
                setattr(part, name, value)


def freeze_what_no_file_keeps(model: PreTrainedModel) -> None:
    """Leave the parameters untrained that `save_pretrained` leaves out, as a model from scratch does.

    In transformers 5.23 a Marian that was loaded trains its sinusoidal positions. They would be lost in the file, and
    an optimizer of a run from scratch would not fit.

    Args:
        model: model that was loaded.
    """
    for name, parameter in model.named_parameters():
        if name in (model._keys_to_ignore_on_save or ()):
            parameter.requires_grad_(False)


def use_languages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_language: str | None,
    target_language: str | None,
) -> None:
    """Set the languages of a multilingual tokenizer (mBART, M2M100, NLLB), and the model's code to begin with.

    Args:
        model: translation model. Its configs get the code as `forced_bos_token_id`, or as `decoder_start_token_id`
            where the tokenizer closes a sentence with the code (mBART). A tokenizer without languages changes nothing.
        tokenizer: tokenizer of both sides.
        source_language (`str`): code of the source language in this tokenizer: `en_XX`, `en` or `eng_Latn`.
        target_language (`str`): code of the target language.

    Raises:
        TyingError: if a language is not given, or the tokenizer does not have it.
    """
    if not hasattr(tokenizer, "set_tgt_lang_special_tokens"):
        return
    try:
        tokenizer.src_lang, tokenizer.tgt_lang = source_language, target_language
        around_source, around_target = tokenizer("")["input_ids"], tokenizer(text_target="")["input_ids"]
    except (KeyError, TypeError):  # M2M100's way to say that it does not know a code; the others' is <unk>
        around_source = around_target = [tokenizer.unk_token_id]
    known = tokenizer.unk_token_id not in around_source + around_target
    if not known or source_language is None or target_language is None:
        raise TyingError(
            f"{type(tokenizer).__name__} does not know both {source_language} and {target_language}: expected its own "
            "codes, such as en_XX (mBART), en (M2M100) or eng_Latn (NLLB)."
        )
    first, last = around_target
    if first == tokenizer.eos_token_id:
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = last
    else:
        model.generation_config.forced_bos_token_id = first


def check_fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    max_source_length: int,
    max_target_length: int,
) -> None:
    """Check that each side of a model has a row for every token, and a position for every place.

    Args:
        model: translation model.
        tokenizer: tokenizer of the source side.
        target_tokenizer: tokenizer of the target side; it may be the same.
        max_source_length (`int`): largest number of tokens in a source sentence.
        max_target_length (`int`): largest number of tokens in a target sentence.

    Raises:
        TyingError: if a side has more tokens than its embedding has rows, or longer sentences than positions.
    """
    sides = {
        "source": (getattr(model.config, "encoder", model.config), tokenizer, max_source_length),
        "target": (getattr(model.config, "decoder", model.config), target_tokenizer, max_target_length),
    }
    for role, (config, side, length) in sides.items():
        rows = shape_of(find_parameter(model, roles(model)[role].names[0]))[0]
        if (needed := rows_needed(side)) > rows:
            raise TyingError(
                f"The tokenizer of the {role} side has {needed} tokens and the {role} embedding {rows} rows: "
                "expected a row for each. Give the tokenizer of this model, or resize the model first."
            )
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and length > positions:
            raise TyingError(
                f"A {role} sentence may have {length} tokens and the model has {positions} positions: set "
                f"--max_{role}_length to {positions} at most."
            )


def translation_collator(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **kwargs: Any
) -> DataCollatorForSeq2Seq:
    """Make a collator that pads a batch of `encode_parallel`, and shifts its labels right for the decoder.

    The inputs are made here since label smoothing takes the labels from the model, and some (M2M100, Blenderbot) would
    then have none. Labels stay as they are: FSMT's own shift writes its padding over the -100 in them.

    Args:
        model: model that says how labels are shifted.
        tokenizer: tokenizer of the source side.
        **kwargs: keywords of `DataCollatorForSeq2Seq`, such as `pad_to_multiple_of`.
    """

    def shifted(labels: torch.Tensor) -> torch.Tensor:
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            return model.prepare_decoder_input_ids_from_labels(labels=labels.clone())
        start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
        inputs = torch.cat([start, labels[:, :-1]], dim=1)
        return inputs.masked_fill(inputs == -100, model.config.pad_token_id)

    return _Collator(tokenizer, SimpleNamespace(prepare_decoder_input_ids_from_labels=shifted), **kwargs)


class _Collator(DataCollatorForSeq2Seq):
    """Leaves `labels` out of a batch that has none: `Seq2SeqTrainer` asks a loss of any batch that names them."""

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        batch = super().__call__(features, return_tensors)
        if batch.get("labels", 0) is None:
            del batch["labels"]
        return batch


class TwoTokenizersCallback(TrainerCallback):
    """Keep both tokenizers with each checkpoint and with the model: the target side's in `decoder_tokenizer/`.

    The `Trainer` itself gets no `processing_class` then: it would give the special ids of that one to the decoder.

    Args:
        tokenizer: tokenizer of the source side.
        target_tokenizer: tokenizer of the target side.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.target_tokenizer = tokenizer, target_tokenizer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save both tokenizers with the checkpoint."""
        self._save(Path(args.output_dir, f"checkpoint-{state.global_step}"), state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save both tokenizers with the model."""
        self._save(Path(args.output_dir), state)

    def _save(self, folder: Path, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self.tokenizer.save_pretrained(folder)
            self.target_tokenizer.save_pretrained(folder / TARGET_TOKENIZER)


def target_tokenizer_beside(model_path: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `decoder_tokenizer/` of a model's folder, or `None` if there is none."""
    folder = Path(model_path, TARGET_TOKENIZER)
    return AutoTokenizer.from_pretrained(folder) if folder.is_dir() else None
