"""`extend_vocabulary`: a trained model learns the words of another text, and keeps all that it has."""

import copy
import json

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from ..config import TyingError
from ..ties.anatomy import Anatomy
from ..ties.slots import find_parameter
from ..ties.tying import refuse_partitioned, refuse_unfit
from .joint import VocabularySide, join_words

logger = logging.get_logger(__name__)


@torch.no_grad()
def extend_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text_tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """Add the words of another text to the vocabulary of a trained model, in place.

    All words of the model keep their ids and their rows, bit for bit. Each new word has the mean of all old rows, and
    the mean of an output bias. Tied matrices stay one. The words are joined by their spelling, as in
    `join_vocabularies`; special tokens also by their roles.

    Args:
        model: any `PreTrainedModel` with one vocabulary. It is changed in place, or not at all.
        tokenizer: its tokenizer, of whole words (`tokenizers.models.WordLevel`).
        text_tokenizer: tokenizer of whole words that was trained on the other text.

    Returns:
        A new tokenizer of the model, which splits text as `tokenizer` does; `tokenizer` itself if no word is new.

    Raises:
        TyingError: a tokenizer does not have whole words, or has more words than the model has rows; the model is
            adapted (PEFT), quantised, or has two vocabularies.

    Source: Howard & Ruder 2018 section 3.2, with the released code's rows for new words.

    Example:
        >>> tokenizer = extend_vocabulary(model, tokenizer, train_word_tokenizer(texts))
    """
    refuse_unfit(model, "extend the vocabulary of")
    refuse_partitioned(model, "extend the vocabulary of")
    for one in (tokenizer, text_tokenizer):
        kind = type(getattr(getattr(one, "backend_tokenizer", None), "model", None)).__name__
        if kind != "WordLevel":
            raise TyingError(
                f"{type(one).__name__} has a {kind} vocabulary: expected whole words (WordLevel). A vocabulary of "
                "pieces writes new words already; for new tokens, tokenizer.add_tokens(...) and "
                "model.resize_token_embeddings(len(tokenizer))."
            )
    anatomy = Anatomy(model)
    names = [name for found in anatomy.roles.values() for name in found.names]
    rows = {len(anatomy.slots[name]) for name in names}
    if len(rows) != 1 or len(tokenizer) > min(rows):
        raise TyingError(
            f"The tokenizer has {len(tokenizer)} words, and the vocabulary matrices of {type(model).__name__} "
            f"{sorted(rows)} rows: expected one vocabulary, with a row for each word."
        )
    old = rows.pop()
    own, other = (VocabularySide(one, one.get_vocab()) for one in (tokenizer, text_tokenizer))
    joint = join_words(other, own, old, "spelling")
    if not joint.source_only:
        return tokenizer

    output = anatomy.roles.get("output")
    bias = None if output is None else output.name.removesuffix("weight") + "bias"
    names += [bias] if bias in anatomy.slots else []
    means = {name: anatomy.slots[name].data.to(torch.float64).mean(dim=0) for name in names}
    model.resize_token_embeddings(joint.size, mean_resizing=False)
    for name, mean in means.items():
        values = find_parameter(model, name).data
        values[old:] = mean.to(values.dtype)
    new = {other.words[index]: joint.source_ids[index] for index in joint.source_only}
    logger.info(f"{len(new)} words are added to the {old} rows of {type(model).__name__}, with the mean row.")
    return _with_words(tokenizer, new)


def _with_words(tokenizer: PreTrainedTokenizerBase, words: dict[str, int]) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] |= words
    extended = copy.deepcopy(tokenizer)
    extended._tokenizer = Tokenizer.from_str(json.dumps(content))
    return extended
