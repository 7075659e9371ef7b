"""A tokenizer of whole words for ordinary text, where punctuation marks are words of their own."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..config import TyingError
from .words import EOS, UNKNOWN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD = "<pad>"


def train_word_tokenizer(
    texts: Iterable[str], vocab_size: int = 30_000, min_frequency: int = 1, lowercase: bool = False
) -> "PreTrainedTokenizerFast":
    """Make a tokenizer of the most frequent words of a text.

    Args:
        texts: training texts.
        vocab_size: largest number of words, with the special tokens. Default 30,000, as in ULMFiT.
        min_frequency: smallest number of times that a word occurs. Default 1.
        lowercase: whether all letters are made small. Default `False`.

    Returns:
        `PreTrainedTokenizerFast` that splits at white space and around each punctuation mark, and ends a text with
        `<eos>`. Other words are `<unk>`. `<pad>` is on the right.

    Raises:
        TyingError: if there is no word.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, UNKNOWN, EOS]
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    steps = [normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    # Also in training, where special tokens are text like any other.
    pattern = Regex("|".join([*special, r"\w+", r"[^\w\s]"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A special token that occurs in the text as well is counted twice, and its second number belongs to no word.
    words = sorted(vocabulary := tokenizer.get_vocab(), key=vocabulary.__getitem__)
    tokenizer.model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN)
    if tokenizer.get_vocab_size() <= len(special):
        raise TyingError(f"The text has no word that occurs {min_frequency} times: expected one at least.")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, special.index(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
