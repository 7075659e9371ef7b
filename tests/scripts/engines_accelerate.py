"""Every kind of tests/engines.py under DDP and FSDP2 by `Accelerator.prepare`: started by `run_script`."""

from functools import partial

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from hf_tying import assert_tied, use_tied_loss
from hf_tying.objectives import ContrastiveObjective
from tests.engines import KINDS, RATE, alone, apart, inputs, own_rows, start, train
from tests.processes import run_cases


def accelerator_of(plugin: FullyShardedDataParallelPlugin | None = None) -> Accelerator:
    """An `Accelerator` of the processes at hand. It has no FSDP on a CPU, so its state is told that it has."""
    AcceleratorState._reset_state(), GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP if plugin else DistributedType.MULTI_CPU
    if plugin is not None:
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


def prepared(kind: str, plugin: FullyShardedDataParallelPlugin | None = None):
    accelerator = accelerator_of(plugin)
    model = start(kind)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=RATE)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    assert_tied(wrapped)
    return accelerator, wrapped, optimizer


def trained(accelerator, wrapped, optimizer):
    inner = accelerator.unwrap_model(wrapped)

    def full(tensor):
        return None if tensor is None else tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()

    return train(
        wrapped, lambda: wrapped(**inputs(inner, own_rows())), accelerator.backward, optimizer.step,
        optimizer.zero_grad, full_gradient=lambda p: full(p.grad), full=lambda p: full(p.detach()),
    )  # fmt: skip


def ddp(kind: str) -> dict:
    accelerator, wrapped, optimizer = prepared(kind)
    assert isinstance(wrapped, DistributedDataParallel)
    return apart(trained(accelerator, wrapped, optimizer), alone(kind))


def plugin_of(**options) -> FullyShardedDataParallelPlugin:
    options = {"cpu_ram_efficient_loading": False, "reshard_after_forward": True} | options
    return FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options)


def fsdp2(kind: str, **options) -> dict:
    accelerator, wrapped, optimizer = prepared(kind, plugin_of(**options))
    found = sharding(wrapped)
    return {**apart(trained(accelerator, wrapped, optimizer), alone(kind)), **found}


def sharding(wrapped) -> dict:
    """How many units there are, and whether all parameters are shards."""
    return {
        "units": sum(isinstance(module, FSDPModule) for module in wrapped.modules()),
        "sharded": all(hasattr(p, "device_mesh") for p in wrapped.parameters()),
    }


def compiled(kind: str) -> dict:
    """Compiled whole: a tied loss then runs as it is."""
    accelerator, wrapped, optimizer = prepared(kind, plugin_of())
    how = sharding(wrapped)
    found = trained(accelerator, torch.compile(wrapped, backend="aot_eager"), optimizer)
    return {**apart(found, alone(kind)), **how}


def halved(kind: str) -> dict:
    """A control: the gradient of one matrix is halved on its way, and the comparison must tell."""
    accelerator, wrapped, optimizer = prepared(kind)
    accelerator.unwrap_model(wrapped).get_output_embeddings().weight.register_hook(lambda gradient: gradient / 2)
    return apart(trained(accelerator, wrapped, optimizer), alone(kind))


def not_gathered() -> dict:
    """A control: each process has the words of its own rows alone as candidates."""
    accelerator, wrapped, optimizer = prepared("llama CWT")
    use_tied_loss(wrapped, objective=ContrastiveObjective(gather=False))
    return apart(trained(accelerator, wrapped, optimizer), alone("llama CWT"))


def not_reduced(kind: str) -> dict:
    """A control: no collective."""
    accelerator, wrapped, optimizer = prepared(kind)
    with wrapped.no_sync():
        return apart(trained(accelerator, wrapped, optimizer), alone(kind))


CHECKPOINTED = ("llama two_way", "llama layers", "bart tied loss", "llama tied loss")
LOADED_ON_META = (
    "llama two_way",
    "llama layers",
    "t5 three_way",
    "bert two_way",
    "encoder-decoder three_way",
    "llama CWT",
)
CASES = {
    **{f"ddp, {kind}": partial(ddp, kind) for kind in KINDS},
    **{f"fsdp2, {kind}": partial(fsdp2, kind) for kind in KINDS},
    **{f"fsdp2 checkpointed, {kind}": partial(fsdp2, kind, activation_checkpointing=True) for kind in CHECKPOINTED},
    **{f"fsdp2 from meta, {kind}": partial(fsdp2, kind, cpu_ram_efficient_loading=True) for kind in LOADED_ON_META},
    **{f"fsdp2 compiled, {kind}": partial(compiled, kind) for kind in ("llama two_way", "llama tied loss")},
    "control, halved": partial(halved, "llama two_way"),
    "control, not reduced": partial(not_reduced, "llama two_way"),
    "control, not gathered": not_gathered,
}  # fmt: skip

if __name__ == "__main__":
    run_cases(CASES)
