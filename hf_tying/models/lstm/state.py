"""The state of the language model: its check before use, and the choice of its rows."""

import torch

from hf_tying.config import TyingError

#: A layer's last output and its cell, each (batch, width).
LayerState = tuple[torch.Tensor, torch.Tensor]


def check_state(state: tuple[LayerState, ...], batch: int, widths: list[int]) -> None:
    """Refuse a state that does not fit. `torch.lstm` does not check it, and reads beyond the memory of a small one.

    Args:
        state: last output and cell of each layer.
        batch: number of texts in the batch.
        widths: widths of the layers.

    Raises:
        TyingError: if the number of layers differs, or a part is not (batch, width).
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
    """Select rows of a state.

    Args:
        state: last output and cell of each layer, each (batch, width).
        rows: (new batch,), int64, the rows in their new order. A row may occur several times.

    Returns:
        The state of the new batch.
    """
    return tuple(tuple(part.index_select(0, rows.to(part.device)) for part in layer) for layer in state)
