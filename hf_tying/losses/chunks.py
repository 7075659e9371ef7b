"""The cut of a softmax of N tokens over V words into chunks of tokens and blocks of words, and what is kept between.

The smallest chunk of tokens decides how fast the matrix products run, and how often the gradient of the matrix is read
and written: a few rows at a time are several times slower than some hundred. The words of a block decide how much of
the work on logits stays in the cache. Both follow from the shape, the dtype and a budget of bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt

import torch

MIB = 2**20
#: A chunk of fewer tokens than this costs more in the products and in traffic than computing its logits twice.
FEWEST_ROWS = 192
#: Bytes of one block at work. On a CPU it should stay in the cache between the passes over it.
_AT_WORK = {"cpu": 4 * MIB}
_AT_WORK_ELSEWHERE = 64 * MIB
_NARROWEST, _WIDEST = 128, 8192
#: Elements of a cache line in float32, and the fewest columns of a block that are worth filling one up.
_LINE, _FEW = 16, 64


@dataclass(frozen=True)
class ChunkPlan:
    """The order of a walk: each chunk of tokens over all blocks of words, twice where there are gradients.

    Attributes:
        tokens: chunks of tokens.
        blocks: blocks of words.
        buffer: room for values between the two passes, in elements of the matrix's dtype. The first chunk of tokens
            also has the memory of the matrix's own gradient, which is not written yet.
    """

    tokens: tuple[slice, ...]
    blocks: tuple[slice, ...]
    buffer: int = 0

    @property
    def longest_block(self) -> int:
        """Elements of memory that the largest block takes (`block_in`)."""
        return row_length(_longest(self.tokens)) * _longest(self.blocks)


def default_budget(vocabulary: int, width: int, itemsize: int) -> int:
    """Bytes beside the one gradient of the matrix: as many as that one has, from 16 to 64 MiB, or an eighth of it."""
    gradient = vocabulary * width * itemsize
    return max(16 * MIB, min(gradient, 64 * MIB), gradient // 8)


def plan_chunks(
    tokens: int, width: int, vocabulary: int, itemsize: int, exact_itemsize: int, *,
    budget: int, gradients: bool, matrix_gradient: bool, accumulates: bool, device: str,
) -> ChunkPlan:  # fmt: skip
    """Choose the axis and the sizes.

    In float32 the tokens are cut when their values do not fit, and the gradient of the matrix is summed over chunks,
    unless that would cut them too small. In half precision such a sum loses accuracy: there each of its rows is
    written once, from all tokens, and values that do not fit are computed twice.

    Args:
        tokens: number N of tokens.
        width: width D of the hidden states.
        vocabulary: number V of words.
        itemsize: bytes of an element of the matrix, in whose dtype values are kept.
        exact_itemsize: bytes of an element of the block at work.
        budget: bytes for all memory beside the gradients of the matrix and of the hidden states.
        gradients: whether there is a second pass.
        matrix_gradient: whether the matrix is trained.
        accumulates: whether its gradient may be summed over chunks of tokens.
        device: type of the device: `"cpu"`, `"cuda"`, ...
    """
    at_work = min(_AT_WORK.get(device, _AT_WORK_ELSEWHERE), max(budget // 2, 1))
    most = max(_without_gaps(at_work // (_NARROWEST * exact_itemsize)), 1)
    if not gradients:
        chunks = even_slices(0, tokens, most)
        return ChunkPlan(chunks, _blocks(_longest(chunks), vocabulary, at_work // exact_itemsize))

    def room(rows: int) -> int:
        """Values that the budget has room for beside the block at work and copies of `rows` hidden states.

        These are: in the dtype and the scale of the products, weighted for the second pass, and the targets' rows. A
        matrix of another dtype is converted block by block, and so is its gradient.
        """
        converted = 0 if accumulates else 2 * _columns(rows, vocabulary, at_work // exact_itemsize) * width
        return max(budget - at_work - (3 * rows * width + converted) * exact_itemsize, 0) // itemsize

    borrowed = vocabulary * width if matrix_gradient else 0

    def missing(rows: int) -> int:
        """Values of the first chunk that the gradient's memory has no room for."""
        return 0 if matrix_gradient and rows <= width else max(row_length(rows) * vocabulary - borrowed, 0)

    chunks = even_slices(0, tokens, max(tokens, 1))
    extra = width if matrix_gradient else 0  # rows of the first chunk in the memory of the gradient
    copies = 3 * width * exact_itemsize
    later = _without_gaps((budget - at_work - extra * copies) // (vocabulary * itemsize + copies))
    if accumulates and missing(tokens) > room(tokens) and later >= FEWEST_ROWS:
        chunks = (slice(0, later + extra), *even_slices(later + extra, tokens, later))
    needed = max(
        [missing(_longest(chunks[:1])), *(vocabulary * row_length(_longest([chunk])) for chunk in chunks[1:])]
    )
    blocks = _blocks(_longest(chunks), vocabulary, at_work // exact_itemsize)
    return ChunkPlan(chunks, blocks, min(room(_longest(chunks)), needed))


def plan_tiles(tokens: int, vocabulary: int, itemsize: int, device: str, block_bytes: int | None = None) -> ChunkPlan:
    """Cut a softmax into tiles about as high as wide, each computed once in a pass: the shape of the fastest products.

    Args:
        tokens: N.
        vocabulary: V.
        itemsize: bytes of an element of a tile.
        device: `"cpu"`, `"cuda"`, ...
        block_bytes: most bytes of a tile. Default: by the device, as for the blocks of `plan_chunks`.
    """
    values = max((block_bytes or _AT_WORK.get(device, _AT_WORK_ELSEWHERE)) // itemsize, 1)
    rows = max(min(tokens, isqrt(values)), 1)
    columns = max(min(values // row_length(rows), vocabulary), 1)
    return ChunkPlan(even_slices(0, tokens, max(values // columns, 1)), even_slices(0, vocabulary, columns))


def row_length(tokens: int) -> int:
    """Elements of memory for a row of `tokens` values: whole cache lines, unless there are few.

    A product of float32 matrices into rows of another length is a third slower, whatever the number of columns
    (64 and 90 GFLOP/s of one thread; torch 2.13 with MKL, AVX-512).
    """
    return tokens if tokens < _FEW else -(-tokens // _LINE) * _LINE


def _without_gaps(tokens: int) -> int:
    """The most tokens up to `tokens` of which no row is longer than they are."""
    return tokens if tokens < _FEW else tokens // _LINE * _LINE


def block_in(memory: torch.Tensor, words: int, tokens: int) -> torch.Tensor:
    """A block (words, tokens) at the beginning of `memory`, which is flat; `row_length` elements for each row."""
    length = row_length(tokens)
    return memory[: words * length].view(words, length)[:, :tokens]


def targets_by_block(labels: torch.Tensor, blocks: tuple[slice, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Find the targets in each block of a (V, N) matrix.

    Args:
        labels: target of each column, (N,), int64; a negative one is in no block.
        blocks: slices of the rows, one after the other.

    Returns:
        For each block, rows within it and columns of the targets in it.
    """
    words, columns = labels.sort()
    starts = torch.tensor([block.start for block in blocks], device=words.device)
    bounds = [*torch.searchsorted(words, starts).tolist(), len(words)]
    return [(words[a:b] - block.start, columns[a:b]) for block, a, b in zip(blocks, bounds, bounds[1:], strict=False)]


def even_slices(start: int, stop: int, most: int) -> tuple[slice, ...]:
    """Slices of `most` or somewhat fewer, so that the last is not a small one."""
    count = -(-(stop - start) // most)
    bounds = [start + (stop - start) * i // count for i in range(count + 1)] if count > 0 else []
    return tuple(slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False))


def _blocks(rows: int, vocabulary: int, values: int) -> tuple[slice, ...]:
    return even_slices(0, vocabulary, _columns(rows, vocabulary, values))


def _columns(rows: int, vocabulary: int, values: int) -> int:
    return min(max(values // max(row_length(rows), 1), _NARROWEST), _WIDEST, vocabulary)


def _longest(slices: Iterable[slice]) -> int:
    return max((part.stop - part.start for part in slices), default=0)
