"""The tied softmax and its one gradient under DDP and FSDP2, in two processes on the CPU: started by `run_script`."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from hf_tying.losses import autograd, embedding, reference_cross_entropy, tied_cross_entropy, tied_embedding
from tests.processes import run_cases

WORDS, WIDTH = 50, 8


class Model(nn.Module):
    """One matrix in one embedding and the head, or in two and the head."""

    embed, loss = staticmethod(tied_embedding), staticmethod(tied_cross_entropy)

    def __init__(self, three_way: bool = False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(WORDS, WIDTH))
        self.body = nn.Linear(WIDTH, WIDTH)
        self.three_way, self.options = three_way, options

    def forward(self, ids, labels):
        rows = self.embed(ids, self.weight)
        if self.three_way:
            rows = rows + self.embed(ids.flip(1), self.weight)
        return self.loss(torch.tanh(self.body(rows)), self.weight, labels, **self.options).mean()


class Usual(Model):
    embed, loss = staticmethod(F.embedding), staticmethod(reference_cross_entropy)


def batches(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(4, 5): two rows for each process, in each step others."""
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randint(WORDS, (4, 5), generator=generator) for _ in range(2))


def own(tensors):
    return [tensor.chunk(dist.get_world_size())[dist.get_rank()] for tensor in tensors]


def alone(**options) -> Model:
    """Three steps of one process, on the whole batch and in plain torch: the reference."""
    model = Usual(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        optimizer.zero_grad()
        model(*batches(step)).backward()
        optimizer.step()
    return model


def drift(state: dict, expected: Model) -> float:
    return max((state[name] - value).abs().max().item() for name, value in expected.state_dict().items())


class Ways:
    """Counts the ways that the code of this package takes while it is in `with`."""

    def __enter__(self):
        self.counts = {"tied softmax": 0, "one gradient": 0}
        self.finish, self.claimed = autograd.finish_gradients, embedding.claimed_gradient

        def finish_gradients(*args):
            self.counts["tied softmax"] += 1
            return self.finish(*args)

        def claimed_gradient(weight):
            claimed = self.claimed(weight)
            self.counts["one gradient"] += claimed is not None
            return claimed

        autograd.finish_gradients, embedding.claimed_gradient = finish_gradients, claimed_gradient
        return self.counts

    def __exit__(self, *error):
        autograd.finish_gradients, embedding.claimed_gradient = self.finish, self.claimed


def ddp(accumulate: bool = False, view: bool = False, **options) -> dict:
    expected = alone(**options)
    model = Model(**options)
    fired, reduced = [], []
    model.weight.register_hook(lambda grad: fired.append(grad.norm().item()))

    def counted(group, bucket):
        reduced.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
    wrapped.register_comm_hook(None, counted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with Ways() as ways:
        for step in range(3):
            optimizer.zero_grad()
            ids, labels = own(batches(step))
            if accumulate:
                with wrapped.no_sync():
                    (wrapped(ids[:1], labels[:1]) / 2).backward()
                (wrapped(ids[1:], labels[1:]) / 2).backward()
            else:
                wrapped(ids, labels).backward()
            optimizer.step()
    return {
        "drift": drift(model.state_dict(), expected),
        "moved": drift(Model(**options).state_dict(), expected),
        "fired": len(fired),
        "reduced": sum(reduced),
        "parameters": sum(parameter.nbytes for parameter in model.parameters()),
        **ways,
    }


def fsdp2(reshard: bool = True, **options) -> dict:
    expected = alone(**options)
    model = Model(**options)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), reshard_after_forward=reshard)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with Ways() as ways:
        for step in range(3):
            optimizer.zero_grad()
            model(*own(batches(step))).backward()
            optimizer.step()
    state = {name: value.full_tensor() for name, value in model.state_dict().items()}
    return {"drift": drift(state, expected), "moved": drift(Model(**options).state_dict(), expected), **ways}


CASES = {
    "ddp, two-way": lambda: ddp(),
    "ddp, three-way": lambda: ddp(three_way=True),
    "ddp, gradients in buckets": lambda: ddp(view=True),
    "ddp, the losses of all tokens": lambda: ddp(reduction="none"),
    "ddp, accumulated": lambda: ddp(accumulate=True),
    "fsdp2, two-way": lambda: fsdp2(),
    "fsdp2, three-way": lambda: fsdp2(three_way=True),
    "fsdp2, not sharded again": lambda: fsdp2(reshard=False),
    "fsdp2, the losses of all tokens": lambda: fsdp2(reduction="none"),
}

if __name__ == "__main__":
    run_cases(CASES)
