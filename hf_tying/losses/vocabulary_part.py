"""The words that one process has, of a vocabulary that tensor parallelism has split over several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class VocabularyPart:
    """A block of rows of the softmax matrix, whose other rows the other processes of a group have.

    Attributes:
        group: of the processes that have the vocabulary.
        start: the first word of this process.
        words: V, of all processes.
    """

    group: dist.ProcessGroup | None
    start: int
    words: int

    def places(self, labels: torch.Tensor, held: int) -> torch.Tensor:
        """The rows of `labels` among the `held` ones of this process; -1 for a word that another one has."""
        places = labels - self.start
        return places.masked_fill_((places < 0) | (places >= held), -1)

    def gathered(self, own: torch.Tensor) -> torch.Tensor:
        """`own` of all processes, stacked in a new first dimension. It has the same shape on each."""
        every = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        if own.numel():
            dist.all_gather(every, own, group=self.group)
        return torch.stack(every)

    def summed(self, own: torch.Tensor) -> torch.Tensor:
        """The sum of `own` over all processes, in its memory."""
        if own.numel():
            dist.all_reduce(own, group=self.group)
        return own

    def check_same(self, labels: torch.Tensor) -> None:
        """Refuse other labels than those of the other processes, for which their logits would be taken.

        Raises:
            RuntimeError: on all processes, if two differ.
        """
        flat = labels.reshape(-1)
        order = torch.arange(1, len(flat) + 1, device=flat.device)
        found = self.gathered(torch.stack([flat.new_tensor(len(flat)), (flat * order).sum()]))
        if (found != found[0]).any():
            raise RuntimeError(
                "The matrix is split over the vocabulary, and its processes have different tokens: expected hidden "
                "states and labels that are the same on all of them, as tensor parallelism has them. Where each "
                "process has a batch of its own (FSDP2), give the whole matrix: weight.full_tensor()."
            )


def is_split_vocabulary(weight: torch.Tensor) -> bool:
    """Whether `weight` is a DTensor that gives each process of a mesh of one dimension a block of its rows."""
    mesh = getattr(weight, "device_mesh", None)
    return mesh is not None and mesh.ndim == 1 and _placements(weight)[0].is_shard(0)


def own_part(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, VocabularyPart]:
    """What this process has of a softmax whose matrix is split (`is_split_vocabulary`).

    Args:
        weight: (V, D), a DTensor.
        bias: (V,), a DTensor that is split like `weight`; or the whole one, if it is not trained.

    Returns:
        The rows of this process, the bias of these words, and which they are.

    Raises:
        RuntimeError: for a trained bias that is not split as the matrix is.
    """
    mesh: Any = getattr(weight, "device_mesh")  # noqa: B009
    words = len(weight)
    start = min(mesh.get_local_rank() * -(-words // mesh.size()), words)
    own = _local(weight)
    if bias is not None and hasattr(bias, "device_mesh") and _placements(bias) == _placements(weight):
        bias = _local(bias)
    elif bias is not None:
        if hasattr(bias, "device_mesh") or bias.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "The matrix is split over the vocabulary, and a bias that is trained whole would get the gradient of "
                "a part of its words on each process: expected a DTensor that is split as the matrix is, "
                "distribute_tensor(bias, weight.device_mesh, weight.placements), or bias.detach()."
            )
        bias = bias[start : start + len(own)]
    return own, bias, VocabularyPart(mesh.get_group(), start, words)


def whole(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself, or what each process has of a replicated DTensor.

    Raises:
        RuntimeError: for one that is split.
    """
    if not hasattr(tensor, "device_mesh"):
        return tensor
    if not all(placement.is_replicate() for placement in _placements(tensor)):
        raise RuntimeError(
            f"The matrix is split over the vocabulary, and {name} too, as {_placements(tensor)}: expected it whole on "
            f"each process, {name}.redistribute(placements=[Replicate()])."
        )
    return _local(tensor)


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local()


def _placements(tensor: Any) -> tuple[Any, ...]:
    return tuple(tensor.placements)
