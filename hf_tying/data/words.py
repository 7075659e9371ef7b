"""Word-level text as in the papers on LSTM language models: a sentence on each line, words split by spaces.

Every line ends in `<eos>`, an empty line too. The vocabulary is all words of the training file (Mikolov's version of
the Penn Treebank in Zaremba et al. 2014; the same for WikiText-2). Texts are read in contiguous batches: row `b` of a
batch continues row `b` of the previous batch.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from ..config import TyingError
from .text import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


logger = logging.get_logger(__name__)

EOS, UNKNOWN = "<eos>", "<unk>"


def read_words(file: str | Path) -> list[str]:
    """Read all words of a file in their order, with `<eos>` after each line.

    Args:
        file: UTF-8 text.

    Raises:
        TyingError: if the file is missing, empty or not UTF-8.
    """
    lines = read_text(Path(file)).removesuffix("\n").split("\n")  # other ends of a line are spaces
    return [word for line in lines for word in (*line.split(), EOS)]


def train_word_level(file: str | Path, others: Iterable[str | Path] = ()) -> "PreTrainedTokenizerFast":
    """Make a word-level tokenizer whose vocabulary is all words of a training file, the most frequent word first.

    Args:
        file: training text, UTF-8.
        others: texts that will be read with this vocabulary. If they have words that the training text does not have,
            and it has no `<unk>`, then `<unk>` is added, and the log says how many words are affected. No training
            text trains the row of that `<unk>`, so the perplexity of these words is high, as it should be.

    Returns:
        `PreTrainedTokenizerFast` that splits at white space, and ends a text (a line) with `<eos>`.

    Raises:
        TyingError: see `read_words`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    counts = Counter(read_words(file))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    if UNKNOWN not in counts:
        unseen = [word for other in others for word in read_words(other) if word not in counts]
        if unseen:
            logger.warning(
                f"{len(unseen)} words ({len(set(unseen))} different ones, such as {unseen[0]!r}) are not in "
                f"{Path(file).name}, which has no {UNKNOWN} to stand for them: one is added to the vocabulary."
            )
            words.append(UNKNOWN)
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    eos = words.index(EOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, eos)])
    special = {"eos_token": EOS} | ({"unk_token": UNKNOWN} if UNKNOWN in words else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def encode_words(file: str | Path, tokenizer: "PreTrainedTokenizerBase") -> torch.Tensor:
    """Encode all words of a file: the ids that `tokenizer` gives to each line, one line after the other.

    Args:
        file: UTF-8 text.
        tokenizer: tokenizer of `train_word_level`.

    Returns:
        (words,), int64.

    Raises:
        TyingError: see `read_words`; also if the tokenizer does not know a word and has no `<unk>`.
    """
    ids, unknown = tokenizer.get_vocab(), tokenizer.unk_token_id
    words = read_words(file)
    if unknown is None and (unseen := [word for word in words if word not in ids]):
        raise TyingError(
            f"{Path(file).name} has {len(unseen)} words that the tokenizer does not know, such as {unseen[0]!r}, and "
            f"it has no {UNKNOWN}: give this file to train_word_level as one of `others`."
        )
    return torch.tensor([ids.get(word, unknown) for word in words])


class ContiguousText(Dataset):
    """A text cut into `batch_size` columns, each read `time_steps` words at a time.

    Item `t * batch_size + b` is piece t of column b. If the items are read in order, a batch has one piece of every
    column, and the state of a recurrent model after a batch is its state before the next one. `shift_labels` are the
    next words, so no word is lost between pieces. Words that do not fill a column or a last piece are left out.

    Args:
        tokens: (words,), int64.
        batch_size: number of columns.
        time_steps: number of words in a piece, through which gradients are propagated back.

    Raises:
        TyingError: if the text is shorter than one piece for each column.
    """

    def __init__(self, tokens: torch.Tensor, batch_size: int, time_steps: int) -> None:
        if batch_size < 1 or time_steps < 1:
            raise TyingError(f"batch_size={batch_size}, time_steps={time_steps}: expected 1 or more of both.")
        rows = len(tokens) // batch_size
        self.batch_size, self.time_steps, self.pieces = batch_size, time_steps, (rows - 1) // time_steps
        if self.pieces < 1:
            raise TyingError(
                f"The text has {len(tokens)} words: expected at least {batch_size * (time_steps + 1)}, for "
                f"{batch_size} columns of {time_steps} words and the next one. Take a smaller batch or fewer steps, "
                "or give more text."
            )
        self.columns = tokens[: rows * batch_size].view(batch_size, rows)

    def __len__(self) -> int:
        return self.pieces * self.batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `shift_labels`, each (time_steps,), int64."""
        piece, column = divmod(range(len(self))[index], self.batch_size)
        start = piece * self.time_steps
        words = self.columns[column, start : start + self.time_steps + 1]
        return {"input_ids": words[:-1], "shift_labels": words[1:]}
