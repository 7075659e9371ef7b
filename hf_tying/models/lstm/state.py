"""The state of the language model: what is checked before it is used, and how it is taken row by row."""

import torch

from hf_tying.config import TyingError

#: A layer's last output and its cell, each (batch, width).
LayerState = tuple[torch.Tensor, torch.Tensor]


def check_state(state: tuple[LayerState, ...], batch: int, widths: list[int]) -> None:
    """Refuse a state of another shape. `torch.lstm` does not check it, and reads beyond the memory of a smaller one.

    Args:
        state: for each layer its last output and its cell.
        batch: number of texts that are read.
        widths: of the layers.

    Raises:
        TyingError: for another number of layers, or a part that is not (batch, width).
    """
    expected = [[(batch, width)] * 2 for width in widths]
    found = [[tuple(part.shape) for part in layer] for layer in state]
    if found != expected:
        raise TyingError(
            f"The state does not fit the batch: expected an output and a cell for each layer, of shapes {expected}, "
            f"found {found}. Give state=None where new texts begin, drop a last, smaller batch, or take its rows: "
            "tuple(tuple(part[rows] for part in layer) for layer in state)."
        )


def state_rows(state: tuple[LayerState, ...], rows: torch.Tensor) -> tuple[LayerState, ...]:
    """The rows of a state, in the order given, each as often as it is there.

    Args:
        state: of `batch` texts.
        rows: int64, (new batch,).
    """
    return tuple(tuple(part.index_select(0, rows.to(part.device)) for part in layer) for layer in state)
