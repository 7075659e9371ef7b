"""The memory that autograd saves in a training step for the backward pass, on any device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class SavedActivations:
    """The storages that autograd has saved. Each is counted once, also if several views of it are saved.

    Args:
        model: model whose parameters and buffers are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._not_counted = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    @property
    def bytes(self) -> int:
        """The size of all storages together, in bytes."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def see(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count the storage of a tensor, unless it belongs to the model.

        The storage is kept, so that no other one can have its address.

        Args:
            tensor: tensor that autograd saves.

        Returns:
            The same tensor.
        """
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._not_counted:
            self._storages.setdefault(storage.data_ptr(), storage)
        return tensor


@contextmanager
def saved_activations(model: nn.Module) -> Iterator[SavedActivations]:
    """Count the bytes that autograd saves for the backward pass inside this context.

    The number is exact. It is also available on a CPU, where PyTorch does not record a peak:

        with saved_activations(model) as saved:
            loss = model(**batch).loss
        saved.bytes

    Args:
        model: model whose parameters and buffers are not counted. Copies that autocast makes of them are counted.

    Yields:
        A `SavedActivations`, with the number in `.bytes`.
    """
    saved = SavedActivations(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.see, lambda tensor: tensor):
        yield saved
