"""`join_vocabularies`: a trained model with two vocabularies becomes one with a joint vocabulary."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..config import TyingError
from ..ties.groups import other_chains, roles, split_declared
from ..ties.slots import actual_groups, find_parameter, find_slot, fit_rows, why_no_parameter
from ..ties.tying import refuse_unfit
from ..ties.vocabulary import vocabularies_of
from .joint import JointVocabulary, Side, check_overlap, join_words
from .tokenizer import tokenizer_over

logger = logging.get_logger(__name__)

#: What is added to the logit of a word that only the source side has. exp(-100) is nothing beside a probability that a
#: float holds, so the other words keep theirs, and float16 and bfloat16 hold it with room for the logit itself. It is
#: not -inf, nor a number near the largest: label smoothing averages over all words (-inf makes that infinite or NaN,
#: -1e4 makes the reported loss mask and little else), and a label that happens to be such a word costs 100, no more.
MASK = -100.0

_SIZES = ("vocab_size", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size")


def join_vocabularies(
    model: PreTrainedModel, source_tokenizer, target_tokenizer=None, overlap: str = "word"
) -> tuple[PreTrainedModel, Any]:
    """Give a trained translation model with two vocabularies one joint vocabulary, in place.

    For Marian with `share_encoder_decoder_embeddings=False`, FSMT, an `EncoderDecoderModel` of two families, and any
    other model whose source and target embeddings are two matrices. Afterwards all matrices have the same rows, and
    `tie(model, "three_way", init_from="target")` keeps the target's rows and the source's for words that only the
    source has (`init_from="source"`, `"mean"`: see `tie`). Until then nothing is tied that was not, and the logits of
    the target's words are what they were for the same text.

    Ids. Target words keep theirs, and with them labels, generation settings and special tokens. Words that only the
    source has follow behind the last row of the target's matrix, in the order of their old ids. Rows of the target
    without a word (a padded matrix) stay; those of the source are dropped.

    Rows. Each side keeps its trained rows for the words that it has, and takes the other side's row for those that it
    has not.

    One word or two, by `overlap`:

    - `"word"` (the default): the same text at the same place of a word, however a vocabulary marks that place.
      SentencePiece `▁dog`, byte-level `Ġdog` and WordPiece `dog` are one, WordPiece `##ing` and byte-level `ing` too;
      FSMT's `dog</w>` only with its like, since it marks ends and not beginnings. WordPiece writes each punctuation
      mark as a word of its own, so that its `.` is the byte-level `Ġ.`.
    - `"spelling"`: equal strings.
    - `"none"`: no words are one.

    Special and added tokens are one, under each rule, when they are spelled alike or have exactly the same roles
    (`[PAD]` and `<pad>` where both only pad), never more than one to one. A part of the roles is not enough: where
    GPT-2 has one token for beginning, end and unknown, BERT's three stay apart from it.

    The mask. Words that only the source has shall not be generated, since the target side has never learnt when:

    - models with `final_logits_bias` (Marian, BART) have it there, `MASK` for each such word;
    - models with an output bias (BERT, RoBERTa) have it there;
    - for others (GPT-2, FSMT) it is `suppress_tokens` of the generation config, which is saved with the model, with
      `renormalize_logits`, so that beams are scored as before. Logits in training are not masked.

    Lift it by hand, before a training that shall use these words as targets, or one with label smoothing, which adds a
    share of the mask to the reported loss (a constant, no change of direction): `bias[bias < MASK / 2] = 0` for
    `bias = model.final_logits_bias` or `bias = model.get_output_embeddings().bias.data`;
    `model.generation_config.suppress_tokens = None` for the others.

    The tokenizer. A `MarianTokenizer` or `FSMTTokenizer` that holds both vocabularies becomes a stock one with a
    single vocabulary (with `"none"` it cannot, see `JointTokenizer`). A piece that one side did not know and the other
    does gets the other side's id there, no longer the unknown token. Any other pair becomes a `JointTokenizer`, which
    splits text exactly as before.

    An optimizer made before holds matrices of the old size: make it again.

    Args:
        model: changed in place, all or nothing.
        source_tokenizer: of the encoder's side.
        target_tokenizer: of the decoder's side; by default `source_tokenizer`, when that holds both vocabularies.
        overlap (`str`): `"word"`, `"spelling"` or `"none"`, as above.

    Returns:
        The model, and its tokenizer. When the two vocabularies are equal already there is nothing to do: the model
        unchanged, and `source_tokenizer`.

    Raises:
        TyingError: for an unknown rule; a model that is adapted (PEFT), quantised, on the meta device, or has no
            source, target and output matrices; a source matrix that is one with the target's; different hidden sizes;
            a tokenizer with more words than its matrix has rows; a matrix tied to what is no vocabulary; a padding id
            that would change where positions are counted from it. Nothing is changed then.
    """
    target_tokenizer = source_tokenizer if target_tokenizer is None else target_tokenizer
    check_overlap(overlap)
    refuse_unfit(model, "join the vocabularies of")
    source_vocabulary = vocabularies_of(source_tokenizer)[0]
    target_vocabulary = vocabularies_of(target_tokenizer)[1]
    names = _embeddings(model)
    rows = {role: find_parameter(model, members[-1]).shape[0] for role, members in names.items()}
    if source_vocabulary == target_vocabulary and rows["source"] == rows["target"]:
        logger.warning(
            f"Both sides of {type(model).__name__} have the same vocabulary already ({len(source_vocabulary)} words): "
            "nothing is changed."
        )
        return model, source_tokenizer
    _refuse_unjoinable(model, names)
    _refuse_two_ends(target_tokenizer, vocabularies_of(target_tokenizer))
    source, target = Side(source_tokenizer, source_vocabulary), Side(target_tokenizer, target_vocabulary)
    for role, side in (("source", source), ("target", target)):
        last = max(side.words, default=rows[role])
        if last >= rows[role]:
            raise TyingError(
                f"The {role} tokenizer has {len(side.words)} words up to id {last}, the matrix "
                f"{names[role][-1]!r} {rows[role]} rows: expected a row for each word. Give the tokenizer that the "
                "model was trained with, or resize the model to it first."
            )
    joint = join_words(source, target, rows["target"], overlap)
    matrices = _joint_matrices(model, names, joint)
    biases, buffers = _masked(model, names, joint)
    padding = _padding(model, joint, target_tokenizer)
    tokenizer = tokenizer_over(joint, source_tokenizer, target_tokenizer, overlap)

    for parameter, values in [*matrices, *biases]:
        parameter.data, parameter.grad = values, None  # the same parameter: whatever is tied to it stays tied
    for module, name, values in buffers:
        module._buffers[name] = values
    if joint.source_only and not biases and not buffers:
        _suppress(model, joint)
    _write_sizes(model, names, joint)
    _write_source_ids(model, joint, padding)
    both = len(source.words) - len(joint.source_only)
    logger.info(
        f"{type(model).__name__}: {len(source.words)} source and {len(target.words)} target words are {joint.size} "
        f"rows of one vocabulary, {both} words of both sides (overlap {overlap!r})."
    )
    return model, tokenizer


# --- what is refused -------------------------------------------------------------------------------------------------


def _embeddings(model: PreTrainedModel) -> dict[str, list[str]]:
    """The names of the three roles, each a matrix with values."""
    names = roles(model)
    missing = [role for role in ("source", "target", "output") if role not in names]
    if missing:
        raise TyingError(
            f"{type(model).__name__} has no {' and no '.join(missing)} embedding: expected an encoder-decoder model "
            "with a language modelling head."
        )
    for name in (name for members in names.values() for name in members):
        parameter, module = find_parameter(model, name), find_slot(model, name)[0]
        if parameter is None:
            raise TyingError(f"Cannot join the vocabularies: {name!r} {why_no_parameter(model, name)}.")
        if not parameter.is_floating_point() or "quant" in type(module).__module__:
            raise TyingError(
                f"Cannot join the vocabularies: {name!r} is quantised ({type(module).__name__}, {parameter.dtype}). "
                "Join before quantising."
            )
        if parameter.is_meta:
            raise TyingError(
                f"Cannot join the vocabularies: {name!r} is on the meta device and has no value. Load the weights "
                "first."
            )
        if parameter.ndim != 2:
            raise TyingError(
                f"Cannot join the vocabularies: {name!r} has shape {tuple(parameter.shape)}, expected a row for each "
                "word. The encoder of this model reads no text."
            )
    return names


def _refuse_two_ends(tokenizer, vocabularies: tuple[dict[str, int], dict[str, int]]) -> None:
    """A tokenizer with two vocabularies (Marian, FSMT) ends texts of both sides with the id of the source's end."""
    end = tokenizer.special_tokens_map.get("eos_token") or tokenizer.special_tokens_map.get("sep_token")
    ids = [vocabulary.get(end) for vocabulary in vocabularies]
    if ids[0] != ids[1]:
        raise TyingError(
            f"{type(tokenizer).__name__} ends the text of both sides with id {ids[0]}, but its target vocabulary has "
            f"the end of a text at {ids[1]}: the model has learnt a wrong word as the end. Expected one id for both."
        )


def _refuse_unjoinable(model: PreTrainedModel, names: dict[str, list[str]]) -> None:
    held = {role: find_parameter(model, members[-1]) for role, members in names.items()}
    if held["source"] is held["target"] or held["source"] is held["output"]:
        raise TyingError(
            f"The vocabularies of source and target differ, but {names['source'][-1]!r} and the target's matrix are "
            "one parameter: every row would stand for two words. Expected two matrices. If the model was trained with "
            "these two tokenizers all the same, untie(model) first; else give both sides the tokenizer that it was "
            "trained with."
        )
    source, target, output = (tuple(held[role].shape) for role in ("source", "target", "output"))
    if source[1] != target[1] or target != output:
        raise TyingError(
            f"Cannot join the vocabularies: {names['source'][-1]!r} is {source}, {names['target'][-1]!r} {target}, "
            f"{names['output'][-1]!r} {output}. Expected one width for all, and as many rows in the last two: rows of "
            "different width cannot be in one matrix."
        )
    known = {name for members in names.values() for name in members}
    for chain in actual_groups(model):
        if known & set(chain) and set(chain) - known:
            other = min(set(chain) - known)
            raise TyingError(
                f"Cannot join the vocabularies: {other!r} is tied to {min(known & set(chain))!r}, and is no "
                f"vocabulary matrix. untie(model, [{other!r}]) first."
            )


# --- the new values, before anything is changed ----------------------------------------------------------------------


def _joint_matrices(model, names: dict[str, list[str]], joint: JointVocabulary) -> list[tuple]:
    source, target = (find_parameter(model, names[role][-1]).data for role in ("source", "target"))
    old, new = (torch.tensor(ids, device=source.device) for ids in zip(*sorted(joint.source_ids.items()), strict=True))
    matrices = {}
    for role, members in names.items():
        for parameter in (find_parameter(model, name) for name in members):
            if id(parameter) in matrices:
                continue
            own = parameter.data
            values = own.new_empty(joint.size, own.shape[1])
            if role == "source":
                values[: joint.target_size] = target.to(own)
                values[new.to(own.device)] = own[old.to(own.device)]
            else:
                values[: joint.target_size] = own
                values[joint.target_size :] = source[joint.source_only].to(own)
            matrices[id(parameter)] = (parameter, values)
    return list(matrices.values())


def _masked(model, names: dict[str, list[str]], joint: JointVocabulary) -> tuple[list[tuple], list[tuple]]:
    """Biases (parameters and their values) and buffers that keep words of the source alone from being generated."""
    more = joint.size - joint.target_size
    buffers = [
        (module, name, nn.functional.pad(buffer, (0, more), value=MASK))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if name == "final_logits_bias" and buffer is not None
    ]
    output = names["output"][-1].removesuffix("weight") + "bias"
    chains = [chain for chain in other_chains(model, split_declared(model)) if output in chain]
    held = {id(p): p for n in [output, *sum(chains, [])] if (p := find_parameter(model, n)) is not None}
    value = 0.0 if buffers else MASK
    biases = [(p, nn.functional.pad(p.data, (0, more), value=value)) for p in held.values()]
    if more and not biases and not buffers and getattr(model, "generation_config", None) is None:
        raise TyingError(
            f"{type(model).__name__} has no output bias and no generation_config: nothing can keep it from generating "
            "words of the source. Give it one: model.generation_config = GenerationConfig.from_model_config(config)."
        )
    return biases, buffers


def _padding(model, joint: JointVocabulary, target_tokenizer) -> tuple[int, int] | None:
    """The padding id of the source side, before and after; `None` where it stays."""
    config = _source_config(model)
    before = config.pad_token_id
    after = joint.source_ids.get(before, before)
    if before is None or after == before:
        return None
    pad = target_tokenizer.special_tokens_map.get("pad_token")
    if config is model.config and after != vocabularies_of(target_tokenizer)[1].get(pad):
        raise TyingError(
            f"{type(config).__name__} has one padding id for both sides, {before}: the source's {before} becomes "
            f"{after}, which is not the target's padding token {pad!r}. Expected padding "
            "tokens that are spelled alike, or only pad on both sides."
        )
    embedding = find_slot(model, roles(model)["source"][-1])[0]
    counting = model if config is model.config else model.get_encoder()
    for name, module in counting.named_modules():
        table = isinstance(module, nn.Embedding) or hasattr(module, "embedding_dim")
        if table and module is not embedding and not _holds_words(model, module):
            if getattr(module, "padding_idx", None) is not None:
                raise TyingError(
                    f"{type(counting).__name__} counts positions from the padding id ({name!r}): it is {before}, and "
                    f"would become {after}. Expected the id to stay: use a target tokenizer whose padding token has "
                    f"the id {before}."
                )
    return before, after


def _holds_words(model, module: nn.Module) -> bool:
    return any(find_slot(model, name)[0] is module for names in roles(model).values() for name in names)


def _source_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config that states the ids of the source side: its own in an `EncoderDecoderModel`, else the one of all."""
    config = getattr(model.config, "encoder", None)
    return config if isinstance(config, PreTrainedConfig) else model.config


# --- what is stated beside the matrices ------------------------------------------------------------------------------


def _suppress(model, joint: JointVocabulary) -> None:
    settings = model.generation_config
    masked = range(joint.target_size, joint.size)
    settings.suppress_tokens = sorted({*(settings.suppress_tokens or []), *masked})
    settings.renormalize_logits = True  # scores of beams are then those of the target's words alone


def _write_sizes(model, names: dict[str, list[str]], joint: JointVocabulary) -> None:
    for name in (name for members in names.values() for name in members):
        fit_rows(find_slot(model, name)[0])
    parts = [model.config, *(m.config for m in model.modules() if isinstance(m, PreTrainedModel))]
    parts += [part for part in (getattr(model.config, name, None) for name in ("encoder", "decoder")) if part]
    for config in {id(config): config for config in parts}.values():
        for key in _SIZES:
            if key in vars(config):
                setattr(config, key, joint.size)


def _write_source_ids(model, joint: JointVocabulary, padding: tuple[int, int] | None) -> None:
    config = _source_config(model)
    if config is not model.config:
        for key, value in config.to_dict().items():
            if key.endswith("_token_id") and isinstance(value, int):
                setattr(config, key, joint.source_ids.get(value, value))
    if padding is None:
        return
    before, after = padding
    if config is model.config:
        config.pad_token_id = after
        if getattr(model, "generation_config", None) is not None and model.generation_config.pad_token_id == before:
            model.generation_config.pad_token_id = after
    for module in (model if config is model.config else model.get_encoder()).modules():
        if vars(module).get("padding_idx") == before:
            module.padding_idx = after
