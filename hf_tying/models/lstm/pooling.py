"""What a classifier reads of a text: the last, the largest and the mean output of its real words.

Source: Howard & Ruder 2018 section 3.3 (concat pooling; BPT3C for long texts).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_tying.config import TyingError

from .state import LayerState, state_rows

#: A function from a piece of some texts, (rows, words), and the state before it, to the outputs, (rows, words, width),
#: and the state after it.
Reader = Callable[[torch.Tensor, tuple[LayerState, ...]], tuple[torch.Tensor, tuple[LayerState, ...]]]


@dataclass
class Pooled:
    """The pooled outputs of the words that were read so far.

    Args:
        last: (texts, width), output of the last word.
        largest: (texts, width), largest output of each unit.
        total: (texts, width), sum of the outputs, in float32 at least.
    """

    last: torch.Tensor
    largest: torch.Tensor
    total: torch.Tensor

    @classmethod
    def start(cls, texts: int, width: int, like: torch.Tensor) -> "Pooled":
        """The values before the first word, in the dtype and on the device of `like`."""
        zeros = like.new_zeros(texts, width)
        total = zeros.to(torch.promote_types(like.dtype, torch.float32))
        return cls(zeros, torch.full_like(zeros, float("-inf")), total)

    def add(self, outputs: torch.Tensor, lengths: torch.Tensor) -> "Pooled":
        """Add the outputs of the next words.

        Args:
            outputs: (texts, words, width).
            lengths: (texts,), int64, number of the words, from the first, that belong to each text; 1 or more.
        """
        read = (torch.arange(outputs.shape[1], device=outputs.device) < lengths[:, None])[..., None]
        last = outputs[torch.arange(len(outputs), device=outputs.device), lengths - 1].to(self.last.dtype)
        largest = torch.maximum(self.largest, outputs.masked_fill(~read, float("-inf")).amax(dim=1))
        return Pooled(last, largest, self.total + outputs.masked_fill(~read, 0).sum(dim=1, dtype=self.total.dtype))

    def rows(self, rows: torch.Tensor) -> "Pooled":
        """The values of some texts."""
        return Pooled(self.last[rows], self.largest[rows], self.total[rows])

    def put(self, rows: torch.Tensor, values: "Pooled") -> None:
        """Write the values of some texts."""
        for name in ("last", "largest", "total"):
            part = getattr(self, name).clone()
            part[rows] = getattr(values, name)
            setattr(self, name, part)


def real_words_first(
    words: torch.Tensor, attention_mask: torch.Tensor | None, backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the real words of each text to its beginning, in their order or in the reverse one.

    After that no output of a real word depends on padding, on whichever side it was.

    Args:
        words: (texts, words) ids, or (texts, words, width) vectors.
        attention_mask: (texts, words), 0 for padding. Default: no padding.
        backward: whether the order is reversed.

    Returns:
        The words, with as many columns as the longest text has, and the lengths, (texts,), int64.

    Raises:
        TyingError: if a text has no real word, or the mask has another shape than the words.
    """
    if attention_mask is None:
        attention_mask = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
    if attention_mask.shape != words.shape[:2]:
        raise TyingError(
            f"The attention mask has the shape {tuple(attention_mask.shape)}: expected that of the words, "
            f"{tuple(words.shape[:2])}."
        )
    real = attention_mask.bool()
    lengths = real.sum(dim=1)
    if not len(lengths) or int(lengths.min()) < 1:
        empty = (lengths < 1).nonzero().flatten().tolist()
        raise TyingError(
            f"Texts {empty[:5]} of a batch of {len(lengths)} have no word that is not padding: expected one at least. "
            "Leave empty texts out, or take a tokenizer that ends each text with a token."
        )
    place = torch.arange(real.shape[1], device=real.device).expand_as(real)
    place = real.shape[1] - place if backward else place
    order = place.masked_fill(~real, 2 * real.shape[1]).argsort(dim=1)[:, : int(lengths.max())]
    rows = torch.arange(len(words), device=words.device)[:, None]
    return words[rows, order], lengths


def pool(
    read: Reader,
    words: torch.Tensor,
    lengths: torch.Tensor,
    state: tuple[LayerState, ...],
    gradient_length: int,
    piece_length: int,
) -> Pooled:
    """Read whole texts, and pool the outputs of all their words.

    The last words of each text, `gradient_length` at most, are read at once, with gradient. The words before them are
    read in pieces of `piece_length`, without gradient, and only the state and the pooled values of a piece are kept.
    Where no gradient is asked for (`torch.no_grad`), the whole text is read in pieces.

    Args:
        read: the model.
        words: (texts, words) ids or (texts, words, width) vectors, with the real words first.
        lengths: (texts,), int64, number of real words.
        state: state before the first word.
        gradient_length: number of words.
        piece_length: number of words.

    Returns:
        The values of each text.
    """
    kept = gradient_length if torch.is_grad_enabled() else piece_length
    piece_length = min(piece_length, kept)  # so that one word at least is left to be read at once
    # The number of whole pieces before the words that are read at once.
    pieces = ((lengths - kept).clamp_min(0) + piece_length - 1) // piece_length
    pooled = Pooled.start(len(words), state[-1][0].shape[1], state[-1][0])
    with torch.no_grad():
        for piece in range(int(pieces.max())):
            rows = (pieces > piece).nonzero().flatten()
            columns = words[rows, piece * piece_length : (piece + 1) * piece_length]
            outputs, after = read(columns, state_rows(state, rows))
            pooled.put(rows, pooled.rows(rows).add(outputs, torch.full_like(rows, piece_length)))
            state = _with_rows(state, rows, after)
    rest = lengths - pieces * piece_length
    columns = torch.arange(int(rest.max()), device=words.device) + pieces[:, None] * piece_length
    rows = torch.arange(len(words), device=words.device)[:, None]
    outputs, _ = read(words[rows, columns.clamp_max(words.shape[1] - 1)], state)
    return pooled.add(outputs, rest)


def _with_rows(
    state: tuple[LayerState, ...], rows: torch.Tensor, values: tuple[LayerState, ...]
) -> tuple[LayerState, ...]:
    """A state whose rows are replaced by `values`."""

    def put(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return old.index_copy(0, rows, new.to(old.dtype))  # autocast may have another dtype

    return tuple((put(h, new_h), put(c, new_c)) for (h, c), (new_h, new_c) in zip(state, values, strict=True))
