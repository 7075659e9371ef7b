"""`join_vocabularies`: make one joint vocabulary of the two vocabularies of a trained model."""

from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from ..ties.anatomy import Anatomy
from ..ties.tying import refuse_partitioned, refuse_unfit
from ..ties.vocabulary import vocabularies_of
from .config_ids import padding_move, write_source_ids
from .joint import VocabularySide, check_overlap, join_words
from .refusals import refuse_missing_matrices, refuse_missing_rows, refuse_two_ends, refuse_unjoinable_matrices
from .rows import joint_matrices, masked_biases, suppress_source_words, write_sizes
from .tokenizer import tokenizer_over

logger = logging.get_logger(__name__)


def join_vocabularies(
    model: PreTrainedModel,
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase | None = None,
    overlap: str = "word",
) -> tuple[PreTrainedModel, Any]:
    """Give a trained translation model with two vocabularies one joint vocabulary, in place.

    This is for Marian with `share_encoder_decoder_embeddings=False`, FSMT, an `EncoderDecoderModel` of two families,
    and any other model whose source and target embeddings are two matrices. Afterwards all matrices have the same
    rows. `tie(model, "three_way", init_from="target")` then keeps the target's rows, and the source's rows for words
    that only the source has (`init_from="source"`, `"mean"`: see `tie`). This function itself adds no tie, and the
    logits of the target's words for a text are unchanged.

    **Ids.** Target words keep their ids, so labels, generation settings and special tokens stay valid. Words that only
    the source has come after the last row of the target's matrix, in the order of their old ids. Rows of the target
    without a word (a padded matrix) stay; such rows of the source are dropped.

    **Rows.** Each side keeps its trained rows for its own words, and takes the other side's rows for the other words.

    **Equal words.** `overlap` is the rule by which a source word and a target word become one word:

    - `"word"` (the default): the same text at the same place of a word, whatever mark a vocabulary has for that place.
      SentencePiece `▁dog`, byte-level `Ġdog` and WordPiece `dog` are one word; so are WordPiece `##ing` and byte-level
      `ing`. FSMT marks the ends of words and not their beginnings, so `dog</w>` matches only a word with this mark.
      WordPiece writes each punctuation mark as a word of its own, so its `.` is the byte-level `Ġ.`.
    - `"spelling"`: equal strings.
    - `"none"`: no words become one.

    Under each rule, special and added tokens become one if they are spelled alike or have exactly the same roles
    (`[PAD]` and `<pad>` if both only pad). Each matches one other token at most. A part of the roles is not enough:
    GPT-2 has one token for beginning, end and unknown, and BERT's three tokens do not match it.

    **The mask.** Words that only the source has are not generated, because the target side has not learnt them:

    - In models with `final_logits_bias` (Marian, BART), this bias is `hf_tying.vocabularies.MASK` for each such word.
    - In models with an output bias (BERT, RoBERTa), the bias is `MASK` for each such word.
    - In other models (GPT-2, FSMT), `suppress_tokens` of the generation config has these words. It is saved with the
      model, and with `renormalize_logits`, so that beams are scored as before. Logits in training are not masked.

    Remove the mask before training with these words as targets. Remove it also before training with label smoothing,
    which adds a share of the mask to the reported loss (a constant that does not change the direction of a gradient).
    To remove it, set `bias[bias < MASK / 2] = 0` for `bias = model.final_logits_bias` or
    `bias = model.get_output_embeddings().bias.data`. In other models, set
    `model.generation_config.suppress_tokens = None`.

    **The tokenizer.** A `MarianTokenizer` or `FSMTTokenizer` with both vocabularies becomes a stock tokenizer with a
    single vocabulary (except with `"none"`, see `JointTokenizer`). A piece that only one side had then has that side's
    id on the other side too, where it was the unknown token before. Any other pair becomes a `JointTokenizer`, which
    splits text exactly as before.

    An optimizer made before holds matrices of the old size: make it again.

    Args:
        model: any encoder-decoder with two vocabularies. It is changed in place, or not at all.
        source_tokenizer: tokenizer of the encoder's side.
        target_tokenizer: tokenizer of the decoder's side. Default: `source_tokenizer`, which may hold both
            vocabularies.
        overlap (`str`): `"word"`, `"spelling"` or `"none"`, as above. Default `"word"`, which shares the most rows.

    Returns:
        The model, and its tokenizer. If the two vocabularies are equal already, the model is unchanged, and the
        tokenizer is `source_tokenizer`.

    Raises:
        TyingError: the rule is unknown; the model is adapted (PEFT), quantised, on the meta device, or has no source,
            target and output matrices; the source matrix is one with the target's; the hidden sizes differ; a
            tokenizer has more words than its matrix has rows; a matrix is tied to one that is not of a vocabulary; a
            padding id from which positions are counted would change. Nothing is changed then.
    """
    target_tokenizer = source_tokenizer if target_tokenizer is None else target_tokenizer
    check_overlap(overlap)
    refuse_unfit(model, "join the vocabularies of")
    refuse_partitioned(model, "join the vocabularies of")
    source_vocabulary = vocabularies_of(source_tokenizer)[0]
    target_vocabulary = vocabularies_of(target_tokenizer)[1]
    anatomy = Anatomy(model)
    refuse_missing_matrices(anatomy)
    rows = {role: len(anatomy.slots[found.name]) for role, found in anatomy.roles.items()}
    if source_vocabulary == target_vocabulary and rows["source"] == rows["target"]:
        logger.warning(
            f"Both sides of {type(model).__name__} have the same vocabulary already ({len(source_vocabulary)} words): "
            "nothing is changed."
        )
        return model, source_tokenizer
    refuse_unjoinable_matrices(anatomy)
    refuse_two_ends(target_tokenizer)
    source = VocabularySide(source_tokenizer, source_vocabulary)
    target = VocabularySide(target_tokenizer, target_vocabulary)
    refuse_missing_rows(anatomy, "source", source)
    refuse_missing_rows(anatomy, "target", target)

    # All new values are computed first, so that a refusal leaves the model unchanged.
    joint = join_words(source, target, rows["target"], overlap)
    matrices = joint_matrices(anatomy, joint)
    biases, buffers = masked_biases(anatomy, joint)
    padding = padding_move(anatomy, joint, target_tokenizer)
    tokenizer = tokenizer_over(joint, source_tokenizer, target_tokenizer, overlap)

    for parameter, values in [*matrices, *biases]:
        parameter.data, parameter.grad = values, None  # the parameter is the same, so ties to it stay
    for module, name, values in buffers:
        module._buffers[name] = values
    if joint.source_only and not biases and not buffers:
        suppress_source_words(model, joint)
    write_sizes(anatomy, joint)
    write_source_ids(model, joint, padding)
    both = len(source.words) - len(joint.source_only)
    logger.info(
        f"{type(model).__name__}: {len(source.words)} source and {len(target.words)} target words are {joint.size} "
        f"rows of one vocabulary, {both} words of both sides (overlap {overlap!r})."
    )
    return model, tokenizer
