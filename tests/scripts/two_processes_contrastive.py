"""Contrastive weight tying with the words of both processes as candidates: started by `run_script`."""

import copy

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from hf_tying import use_tied_loss
from hf_tying.losses import contrastive_weight_tying_loss
from hf_tying.objectives.objective import ContrastiveObjective
from tests.processes import run_cases
from tests.tiny import tiny_inputs, tiny_model

WORDS, WIDTH = 20, 6


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(WORDS, WIDTH, dtype=torch.float64))
        self.body = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, ids, labels, **options):
        hidden = torch.tanh(self.body(F.embedding(ids, self.weight)))
        return contrastive_weight_tying_loss(hidden, self.weight, labels, **options)


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def compared(ignored, trainer: bool = False, **options) -> dict:
    """The gradient of two processes by DDP against that of one, with the batch whole."""
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(WORDS, (4, 5), generator=generator) for _ in range(2))
    for place in ignored:
        labels[place] = -100
    rank, many = dist.get_rank(), dist.get_world_size()
    own = slice(2 * rank, 2 * rank + 2)
    alone = Model()
    whole = alone(ids, labels, **options)
    whole.backward()
    found = {}
    for gather in (True, False):
        model = Model()
        wrapped = DistributedDataParallel(model)
        if trainer:  # as Trainer does: the items of all processes, and the loss times their number
            loss = (
                wrapped(ids[own], labels[own], gather=gather, num_items_in_batch=(labels != -100).sum(), **options)
                * many
            )
        else:
            loss = wrapped(ids[own], labels[own], gather=gather, **options)
        loss.backward()
        found[gather] = (gradients(model) - gradients(alone)).abs().max().item()
        if gather:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
    return {"apart": found[True], "not gathered": found[False], "loss": abs(mean.item() / many - whole.item())}


def a_model() -> dict:
    """BERT by `use_tied_loss`: its biases of the head are frozen, so that DDP waits for nothing."""

    def bert():
        model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        return use_tied_loss(model, objective=ContrastiveObjective(gather=True))

    model, start = bert(), bert()
    inputs = tiny_inputs(model)
    inputs["labels"][0, :3] = inputs["labels"][1, :2] = -100
    alone = use_tied_loss(copy.deepcopy(start), objective=ContrastiveObjective())
    accelerator = Accelerator(cpu=True)
    wrapped = accelerator.prepare(model)
    rank = accelerator.process_index
    for trained, rows in ((alone, slice(None)), (wrapped, slice(rank, rank + 1))):
        optimizer = torch.optim.SGD((p for p in trained.parameters() if p.requires_grad), lr=0.3)
        for _ in range(3):
            optimizer.zero_grad()
            loss = trained(**{name: value[rows] for name, value in inputs.items()}).loss
            accelerator.backward(loss)
            optimizer.step()

    def apart(one, other) -> float:
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        return max((a - b).abs().max().item() for a, b in pairs)

    return {"drift": apart(model, alone), "moved": apart(model, start)}


CASES = {
    "even": lambda: compared([]),
    "uneven": lambda: compared([(0, slice(4)), (3, 1)]),
    "one process has none": lambda: compared([0, 1]),
    "unique": lambda: compared([(0, slice(3))], negatives="unique"),
    "the mean of Trainer": lambda: compared([(0, slice(4))], trainer=True),
    "a model": a_model,
}

if __name__ == "__main__":
    run_cases(CASES)
