"""`use_tied_loss` under DDP (through Accelerate) and FSDP2, in two processes on the CPU: started by `run_script`."""

import copy
import logging

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_tying import TyingError, assert_tied, tie, use_tied_loss
from hf_tying.objectives import step_loss
from hf_tying.objectives.tied_loss import has_tied_loss
from tests.objectives.helpers import CWT, batch, model_of, step
from tests.processes import run_cases
from tests.tiny import tiny_inputs, tiny_model

STEPS = 3
blocks: list[int] = []
told: list[str] = []


def watch() -> None:
    """Count the losses that go through the blocks, and keep what the log tells."""
    by_blocks = step_loss.cross_entropy

    def counted(*args, **kwargs):
        blocks.append(1)
        return by_blocks(*args, **kwargs)

    step_loss.cross_entropy = counted
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("hf_tying").addHandler(handler)


def gpt2(scheme: str):
    """Without dropout, in training mode."""
    zero = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return tie(tiny_model("gpt2", tie_word_embeddings=False, **zero), scheme, init_from="target").train()


def inputs(model, rows: slice = slice(None)) -> dict:
    return {name: value[rows] for name, value in tiny_inputs(model).items()}


def trained(model, rows: slice, backward=torch.Tensor.backward, base=None) -> bool:
    """A few steps; whether none of them had logits."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        outputs = model(**inputs(base or model, rows))
        found.append(outputs.logits)
        backward(outputs.loss)
        optimizer.step()
    return all(value is None for value in found)


def state(model) -> dict[str, torch.Tensor]:
    """The values of all parameters, whole; on rank 0 alone."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def drift(found: dict, expected: dict) -> float:
    return max(((found[name] - expected[name]).abs().max().item() for name in found if name in expected), default=0.0)


def compared(scheme: str, train) -> dict:
    """`train` of a model against one process on the whole batch with the stock loss."""
    model = gpt2(scheme)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    alone = copy.deepcopy(model)
    trained(alone, slice(None))
    blocks.clear(), told.clear(), logging.Logger.warning_once.cache_clear()
    without_logits, model, found = train(model)
    assert_tied(model)
    moved = drift(found, start)
    apart = drift(found, {name: p.detach() for name, p in alone.named_parameters()})
    return {
        "drift": apart, "moved": moved, "blocks": len(blocks), "without logits": without_logits, "told": told[:],
        "enabled": has_tied_loss(model),
    }  # fmt: skip


def own(rank: int) -> slice:
    """Each process sees its own half of the batch, with as many labels."""
    return slice(rank, rank + 1)


def ddp(before: bool) -> dict:
    def train(model):
        accelerator = Accelerator(cpu=True)
        if before:
            use_tied_loss(model)
        wrapped = accelerator.prepare(model)
        if not before:
            use_tied_loss(wrapped)
        rows = own(accelerator.process_index)
        return trained(wrapped, rows, accelerator.backward, model), model, dict(model.named_parameters())

    return compared("two_way", train)


def fsdp2(before: bool, scheme: str = "two_way", head_apart: bool = False) -> dict:
    def train(model):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        if before:
            use_tied_loss(model)
        if head_apart:
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if not before:
            use_tied_loss(model)
        return trained(model, own(dist.get_rank())), model, state(model)

    return compared(scheme, train)


def undone() -> dict:
    """What `fully_shard` has made of the class stays."""
    model = use_tied_loss(gpt2("two_way"))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    use_tied_loss(model, False)
    return {"sharded": isinstance(model, FSDPModule), "enabled": has_tied_loss(model)}


def objective_under_ddp() -> dict:
    """An objective for a wrapped model: BERT's head has biases that it leaves unused, GPT-2's has none."""
    bert, gpt2 = (DistributedDataParallel(model_of(arch)) for arch in ("bert", "gpt2"))
    error = None
    try:
        use_tied_loss(bert, objective=CWT)
    except TyingError as refusal:
        error = str(refusal)
    outputs = step(use_tied_loss(gpt2, objective=CWT), batch(gpt2.module))
    return {
        "error": error, "bias is trained": bert.module.cls.predictions.bias.requires_grad,
        "enabled": has_tied_loss(bert.module), "without logits": outputs.logits is None,
    }  # fmt: skip


CASES = {
    "ddp, before": lambda: ddp(before=True),
    "ddp, after": lambda: ddp(before=False),
    "fsdp2, before": lambda: fsdp2(before=True),
    "fsdp2, after": lambda: fsdp2(before=False),
    "fsdp2, head apart": lambda: fsdp2(before=True, scheme="none", head_apart=True),
    "fsdp2, undone": undone,
    "ddp, an objective after": objective_under_ddp,
}

if __name__ == "__main__":
    watch()
    run_cases(CASES)
