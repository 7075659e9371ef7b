"""The order of the rows of an epoch, whatever random numbers were drawn before it."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from transformers import Trainer


class SeededOrder(Sampler):
    """The order of an epoch by seed and number of it alone.

    Runs that draw other numbers, as other methods or after a stop, then see the same batches. By `group_by_length`
    `Trainer` orders an epoch by the random numbers of the moment, so a run that is resumed in it has another order.

    Args:
        sampler: draws an order from torch's global generator.
        trainer: gives the seed, and the number of the epoch.
    """

    def __init__(self, sampler: Sampler, trainer: Trainer) -> None:
        self.sampler, self.trainer = sampler, trainer

    def __len__(self) -> int:
        return len(self.sampler)  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[int]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.trainer.args.seed * 10_007 + int(self.trainer.state.epoch or 0))
            return iter(list(self.sampler))
