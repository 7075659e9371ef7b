"""Byte-level BPE vocabularies of one text, and of both sides of parallel text together.

Byte-level BPE (Radford et al. 2019, section 2.2) can write any text and has no unknown token.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import TyingError
from .text import read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

#: The token that ends every document, and the only special token of `train_byte_level_bpe`.
END_OF_TEXT = "<|endoftext|>"

#: The special tokens of a joint vocabulary and their ids, 0, 1, 2; a token for each language follows.
PAD, BOS, EOS = "<pad>", "<s>", "</s>"

# The suffix that names the language of a file (train.en, train.pt-BR), and suffixes of that form with another meaning.
_LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]{2,8})*")
_NO_LANGUAGES = ("txt", "tok", "raw", "bpe")


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int, progress: bool = False) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE (Radford et al. 2019, section 2.2), which can write any text and has no unknown token.

    Args:
        texts (`Iterable[str]`): training documents, without the validation documents.
        vocab_size (`int`): largest number of entries, with the special token; at least 257. A short text gives fewer.
        progress (`bool`): show progress bars. Default `False`.

    Returns:
        `PreTrainedTokenizerFast` with `<|endoftext|>` as its first and its last token. It has no padding token: many
        models give the padding row no gradient, and here this row is trained.

    Raises:
        TyingError: if `vocab_size` is below 257.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = _trained(texts, vocab_size, [END_OF_TEXT], progress)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def train_joint_tokenizer(
    files: Sequence[str | Path], vocab_size: int, languages: Sequence[str] | None = None
) -> "PreTrainedTokenizerFast":
    """Train one byte-level BPE over both sides of parallel text: the vocabulary that three-way tying needs.

    Args:
        files (`Sequence[str | Path]`): UTF-8 text files of all languages, from the training split only.
        vocab_size (`int`): largest number of entries, with the special tokens; at least 256 and their number.
        languages (`Sequence[str]`, *optional*): codes such as `"en"`. Each gets a token, `"<en>"`. Default: the
            suffixes of the files' names that look like such codes (`train.en`).

    Returns:
        `PreTrainedTokenizerFast` with `<pad>` 0, `<s>` 1 (beginning), `</s>` 2 (end), then the language tokens, which
        are extra special tokens. It ends each sequence with `</s>`.

    Raises:
        TyingError: if `vocab_size` is too small, a language is given twice, there are no files, or a file is missing,
            empty or not UTF-8.
    """
    if isinstance(files, str | Path) or not files:
        raise TyingError(f"Cannot train a joint vocabulary on {files!r}: expected a list of files, of both languages.")
    texts = [read_text(Path(file)) for file in files]
    if languages is None:
        languages = list(dict.fromkeys(filter(None, map(language_of, files))))
    return joint_tokenizer((line.strip() for text in texts for line in text.split("\n")), vocab_size, languages)


def joint_tokenizer(
    lines: Iterable[str], vocab_size: int, languages: Sequence[str] = (), progress: bool = False
) -> "PreTrainedTokenizerFast":
    """Train a joint tokenizer as `train_joint_tokenizer` does, from lines in memory.

    Args:
        lines (`Iterable[str]`): training lines of all languages.
        vocab_size (`int`): largest number of entries, with the special tokens.
        languages (`Sequence[str]`): codes of the languages. Default: none.
        progress (`bool`): show progress bars. Default `False`.

    Raises:
        TyingError: if `vocab_size` is too small, or a language is given twice or has the token of another purpose.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if isinstance(languages, str):
        raise TyingError(f"The languages are {languages!r}: expected a list of codes, such as ['en', 'de'].")
    special = [PAD, BOS, EOS, *(language_token(language) for language in languages)]
    if len(set(special)) < len(special):
        raise TyingError(
            f"The languages {list(languages)} do not make a vocabulary: expected each once, and none whose token is "
            f"{PAD}, {BOS} or {EOS}."
        )
    tokenizer = _trained(lines, vocab_size, special, progress)
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, special.index(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=special[3:],
    )


def language_of(file: str | Path) -> str | None:
    """The language in a file's name, as in `train.en`, `train.pt-BR` or `train.en.txt`; `None` if there is none."""
    for suffix in reversed(Path(file).suffixes):
        code = suffix.removeprefix(".")
        if _LANGUAGE.fullmatch(code) and code not in _NO_LANGUAGES:
            return code
    return None


def language_token(language: str) -> str:
    """The token that stands for a language in a joint vocabulary."""
    return f"<{language}>"


def _trained(texts: Iterable[str], vocab_size: int, special_tokens: list[str], progress: bool) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise TyingError(
            f"A byte-level vocabulary of {vocab_size} is too small: expected at least {least}, every byte and "
            f"{', '.join(special_tokens)}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
