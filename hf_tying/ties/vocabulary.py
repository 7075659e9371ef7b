"""The vocabularies of a tokenizer: one for most, two where an architecture keeps source and target apart."""

from typing import TYPE_CHECKING, Any

from ..config import TyingError

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def vocabularies_of(tokenizer: "PreTrainedTokenizerBase") -> tuple[dict[str, int], dict[str, int]]:
    """The vocabulary of the source side and that of the target side, each from a word to its id.

    `get_vocab()` of `MarianTokenizer` and `FSMTTokenizer` answers for the source side alone, and their
    `get_tgt_vocab()` fails. So both are read from the fields of these two classes.

    Args:
        tokenizer: any transformers tokenizer.

    Returns:
        Two dictionaries; the same one twice where a tokenizer has only one vocabulary.

    Raises:
        TyingError: for anything that is not a tokenizer.
    """
    if not hasattr(tokenizer, "get_vocab"):
        raise TyingError(f"Expected a transformers tokenizer, found {type(tokenizer).__name__}.")
    held: Any = tokenizer
    if getattr(tokenizer, "separate_vocabs", False):  # MarianTokenizer
        return tokenizer.get_vocab(), dict(held.target_encoder)
    if hasattr(tokenizer, "tgt_vocab_size") and hasattr(tokenizer, "src_vocab_size"):  # FSMTTokenizer
        return tokenizer.get_vocab(), {word: index for index, word in held.decoder.items()}
    vocabulary = tokenizer.get_vocab()
    return vocabulary, vocabulary
