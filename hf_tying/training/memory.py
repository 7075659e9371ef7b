"""The memory that a training step keeps for its backward pass, on any device, counted where autograd saves it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class SavedActivations:
    """What autograd has saved: storages by their address, each counted once however many views of it are saved."""

    def __init__(self, model: nn.Module) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._not_counted = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    @property
    def bytes(self) -> int:
        """Of all storages together."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def see(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count the storage of a tensor, if it is none of the model's own; hold it, so that no address comes twice."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._not_counted:
            self._storages.setdefault(storage.data_ptr(), storage)
        return tensor


@contextmanager
def saved_activations(model: nn.Module) -> Iterator[SavedActivations]:
    """Count the bytes that autograd saves for the backward pass while this is open; parameters and buffers are not.

    A number without noise, and of the CPU too, where PyTorch keeps no peak:

        with saved_activations(model) as saved:
            loss = model(**batch).loss
        saved.bytes

    Args:
        model: whose parameters and buffers are not counted. Their copies in another dtype, by autocast, are.
    """
    saved = SavedActivations(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.see, lambda tensor: tensor):
        yield saved
