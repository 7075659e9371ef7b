"""Every kind of tests/engines.py under DDP and FSDP2 by `Accelerator.prepare`: started by `run_script`."""

from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from hf_tying import assert_tied
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


def fsdp2(kind: str, **options) -> dict:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        **{"cpu_ram_efficient_loading": False, "reshard_after_forward": True} | options,
    )  # fmt: skip
    accelerator, wrapped, optimizer = prepared(kind, plugin)
    units = sum(isinstance(module, FSDPModule) for module in wrapped.modules())
    sharded = all(hasattr(p, "device_mesh") for p in wrapped.parameters())
    return {**apart(trained(accelerator, wrapped, optimizer), alone(kind)), "units": units, "sharded": sharded}


def caught(case) -> dict:
    import traceback
    try:
        return case()
    except Exception as e:
        return {"error": traceback.format_exc()[-1500:]}


CASES = {
    **{f"ddp, {kind}": partial(ddp, kind) for kind in KINDS},
    **{f"fsdp2, {kind}": partial(fsdp2, kind) for kind in KINDS},
}
CASES = {n: partial(caught, c) for n, c in CASES.items()}

if __name__ == "__main__":
    run_cases(CASES)
