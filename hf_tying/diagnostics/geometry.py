"""The similarity of two embedding matrices of one vocabulary, and the number of directions that a matrix uses."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..ties.sharding import whole

_METHODS = ("procrustes", "linear")
_BLOCK = 2**24  # similarities computed at once: 128 MiB


@dataclass(frozen=True)
class Alignment:
    """The similarity of the rows of two matrices after one has been mapped onto the other.

    Args:
        cosine: mean cosine between a mapped row and the other matrix's row, at most 1.
        neighbours: mean share of a row's nearest rows that are the same in both matrices, 0 to 1; computed without
            the map.
    """

    cosine: float
    neighbours: float


def alignment(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    method: str = "procrustes",
    neighbours: int = 10,
    rows: torch.Tensor | None = None,
    sample: int = 2000,
    seed: int = 0,
) -> Alignment:
    """Map `a` onto `b` and compare them row by row.

    The map minimises the squared distance to `b`. Before the fit, each matrix loses its mean row, which otherwise is
    most of what its rows have in common. The neighbours of a row are the rows of highest cosine in the same matrix,
    unmapped. Rows that are zero in either matrix (padding) are left out. Everything is computed in float64.

    Args:
        a: (V, D), floating point.
        b: (V, E), floating point, the same words in the same order; `E == D` for `"procrustes"`.
        method: `"procrustes"` for the best rotation (with reflections), which changes no distance within `a`;
            `"linear"` for the best D x E matrix.
        neighbours: number of nearest rows of each row. Default 10, as in the paper's kNN@10.
        rows: (R,), int64: the rows to compare, such as the most frequent words. Default: all.
        sample: largest number of rows among which neighbours are searched, drawn without replacement. Default 2000,
            because the cost grows with its square.
        seed: seed of the draw, which leaves torch's own generator alone. Default 0.

    Returns:
        An `Alignment`; NaN where a matrix is not finite, so that a diagnosis never stops a run that diverges.

    Raises:
        ValueError: the matrices do not fit, the method is unknown, or there are fewer than `neighbours + 1` rows.

    Source: Lopardo et al. 2026 (arXiv 2603.26663), sections on alignment and kNN@10; the map: Schoenemann 1966.

    Example (the reference):
        >>> a, b = a - a.mean(0), b - b.mean(0)
        >>> u, _, vh = torch.linalg.svd(a.T @ b)
        >>> F.cosine_similarity(a @ u @ vh, b).mean()
    """
    if method not in _METHODS:
        raise ValueError(f"Unknown method {method!r}: expected one of {', '.join(_METHODS)}.")
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise ValueError(f"Expected two matrices with a row for the same words, found {_shape(a)} and {_shape(b)}.")
    if method == "procrustes" and a.shape != b.shape:
        raise ValueError(
            f"A rotation needs equal widths, found {_shape(a)} and {_shape(b)}: use method='linear' for these."
        )
    if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1:
        raise ValueError(f"neighbours={neighbours!r}: expected a number from 1.")
    a, b = _exact(a), _exact(b).to(_exact_device(a))
    if rows is not None:
        a, b = a[rows.to(a.device)], b[rows.to(a.device)]
    if not (a.isfinite().all() and b.isfinite().all()):
        return Alignment(math.nan, math.nan)
    used = a.any(dim=1) & b.any(dim=1)
    a, b = a[used], b[used]
    if min(len(a), sample) <= neighbours:
        raise ValueError(
            f"{min(len(a), sample)} rows to compare: expected more than neighbours={neighbours} (rows that are zero "
            "in either matrix are left out)."
        )
    return Alignment(_mapped_cosine(a, b, method), _common_neighbours(a, b, neighbours, sample, seed))


def effective_rank(matrix: torch.Tensor) -> float:
    """Compute the effective rank: exp(entropy) of the singular values as shares of their sum.

    It is 1 for a single nonzero value, and D for D equal values.

    Args:
        matrix: (V, D), floating point. The computation is in float64, from the smaller of its two Gram matrices.

    Returns:
        A number from 1 to min(V, D); 0 for a matrix of zeros, NaN for one that is not finite.

    Raises:
        ValueError: `matrix` does not have two dimensions.

    Source: Roy & Vetterli 2007, "The effective rank", definition 1.

    Example (the reference):
        >>> shares = torch.linalg.svdvals(matrix) / torch.linalg.svdvals(matrix).sum()
        >>> torch.special.entr(shares).sum().exp()
    """
    if matrix.ndim != 2:
        raise ValueError(f"Expected a matrix, found {_shape(matrix)}.")
    matrix = _exact(matrix)
    if not matrix.isfinite().all():
        return math.nan
    peak = matrix.abs().max() if matrix.numel() else 0
    if peak == 0:
        return 0.0
    matrix = matrix / peak
    squares = torch.linalg.eigvalsh(matrix.T @ matrix if len(matrix) > matrix.shape[1] else matrix @ matrix.T)
    # Squares below this bound are rounding errors. Their roots would look like a tail of small singular values.
    squares = squares.where(squares > squares.max() * max(matrix.shape) * torch.finfo(squares.dtype).eps, 0)
    shares = squares.sqrt() / squares.sqrt().sum()
    return torch.special.entr(shares).sum().exp().item()


def _mapped_cosine(a: torch.Tensor, b: torch.Tensor, method: str) -> float:
    a, b = a - a.mean(dim=0), b - b.mean(dim=0)
    if method == "procrustes":
        u, _, vh = torch.linalg.svd(a.T @ b)
        mapped = a @ (u @ vh)
    else:
        mapped = a @ (torch.linalg.pinv(a.T @ a, hermitian=True) @ (a.T @ b))
    return nn.functional.cosine_similarity(mapped, b).mean().item()


def _common_neighbours(a: torch.Tensor, b: torch.Tensor, count: int, sample: int, seed: int) -> float:
    if len(a) > sample:
        drawn = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))[:sample].to(a.device)
        a, b = a[drawn], b[drawn]
    a, b = nn.functional.normalize(a), nn.functional.normalize(b)
    common = 0
    for start in range(0, len(a), size := max(1, _BLOCK // len(a))):
        block = slice(start, start + size)
        near = [_nearest(matrix, block, count) for matrix in (a, b)]
        common += int((near[0][:, :, None] == near[1][:, None, :]).sum())
    return common / (len(a) * count)


def _nearest(matrix: torch.Tensor, block: slice, count: int) -> torch.Tensor:
    """Find the nearest rows of each row in the block, except the row itself: (B, count), int64."""
    similarities = matrix[block] @ matrix.T
    own = torch.arange(len(similarities), device=matrix.device)
    similarities[own, own + block.start] = -math.inf
    return similarities.topk(count).indices


def _exact(matrix: torch.Tensor) -> torch.Tensor:
    matrix = whole(matrix.detach())
    return matrix.to(_exact_device(matrix)).double()


def _exact_device(tensor: torch.Tensor) -> torch.device:
    return tensor.device if tensor.device.type in ("cpu", "cuda") else torch.device("cpu")


def _shape(tensor: torch.Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"
