"""Every kind of tests/engines.py under DDP and FSDP2 by `Accelerator.prepare`: started by `run_script`."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from hf_tying import assert_tied, use_tied_loss
from hf_tying.objectives import ContrastiveObjective
from hf_tying.parallel import parallel_plan
from hf_tying.ties.relaxation import relaxed_names, value_at
from hf_tying.ties.slots import find_slot
from tests.engines import COUNTED, DIFFERENT, KINDS, RATE, alone, beside_one, inputs, own_rows, plain, start, train
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
    return beside_one(trained(accelerator, wrapped, optimizer), kind)


def plugin_of(**options) -> FullyShardedDataParallelPlugin:
    options = {"cpu_ram_efficient_loading": False, "reshard_after_forward": True} | options
    return FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options)


def fsdp2(kind: str, **options) -> dict:
    accelerator, wrapped, optimizer = prepared(kind, plugin_of(**options))
    how = sharding(wrapped)
    found = trained(accelerator, wrapped, optimizer)
    if kind in DIFFERENT:
        places = [find_slot(wrapped, name) for _, _, name in relaxed_names(wrapped)]
        how["asked"] = [getattr(module, name) is module._parameters[name] for module, name in places]
        how["reloaded"] = reloaded(accelerator, wrapped, found.weights)
    return {**beside_one(found, kind), **how}


def reloaded(accelerator: Accelerator, wrapped, weights: dict[str, torch.Tensor]) -> float:
    """The largest difference of what one process, in which nothing is sharded, reads from the model's file."""
    with TemporaryDirectory() as folder:
        accelerator.unwrap_model(wrapped).save_pretrained(
            folder, accelerator.is_main_process, accelerator.get_state_dict(wrapped), save_function=accelerator.save
        )
        if not accelerator.is_main_process:
            return 0.0
        with mock.patch("torch.distributed.is_initialized", return_value=False):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        assert_tied(model)
        [file] = Path(folder).glob("*.safetensors")
        values = load_file(file)
    apart = [p - weights[name] for name, p in model.named_parameters()]
    apart += [value_at(model, name) - values[name] for name, _ in model.named_parameters(remove_duplicate=False)]
    return max(each.abs().max().item() for each in apart)


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
    return {**beside_one(found, kind), **how}


class Holder(nn.Module):
    """A module of a user's own, with a tied model in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = model

    def forward(self, **inputs):
        return self.held(**inputs)


def held(kind: str) -> dict:
    """The first gradient of a model that is a part of another module, whose layers are to be units."""
    accelerator = accelerator_of(plugin_of(transformer_cls_names_to_wrap=["LlamaDecoderLayer"]))
    model = start(kind)
    outer, _ = accelerator.prepare(Holder(model), torch.optim.SGD(model.parameters()))
    accelerator.backward(outer(**inputs(model, own_rows())).loss)
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    found = replace(alone(kind), gradient={plain(name): value for name, value in gradients.items()})
    return {**beside_one(found, kind), **sharding(outer)}


def halved(kind: str) -> dict:
    """A control: the gradient of one matrix is halved on its way, and the comparison must tell."""
    accelerator, wrapped, optimizer = prepared(kind)
    accelerator.unwrap_model(wrapped).get_output_embeddings().weight.register_hook(lambda gradient: gradient / 2)
    return beside_one(trained(accelerator, wrapped, optimizer), kind)


def not_gathered() -> dict:
    """A control: each process has the words of its own rows alone as candidates."""
    accelerator, wrapped, optimizer = prepared("llama CWT")
    use_tied_loss(wrapped, objective=ContrastiveObjective(gather=False))
    return beside_one(trained(accelerator, wrapped, optimizer), "llama CWT")


def not_reduced(kind: str) -> dict:
    """A control: no collective."""
    accelerator, wrapped, optimizer = prepared(kind)
    with wrapped.no_sync():
        return beside_one(trained(accelerator, wrapped, optimizer), kind)


class SentBytes(TorchDispatchMode):
    """The bytes of the whole tensors that FSDP2 gathers and scatters."""

    def __init__(self):
        super().__init__()
        self.by_kind = {"all_gather": 0, "reduce_scatter": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind = {"c10d::_allgather_base_": "all_gather", "c10d::_reduce_scatter_base_": "reduce_scatter"}
        if function._schema.name in kind:
            whole = max(each.nbytes for each in args if isinstance(each, torch.Tensor))
            self.by_kind[kind[function._schema.name]] += whole
        return function(*args, **(kwargs or {}))


def sent(kind: str) -> dict:
    """The bytes of a step, counted, beside those of a plan: under DDP by a communication hook, and under FSDP2."""
    accelerator, wrapped, _ = prepared(kind)
    reduced = []

    def counted(group, bucket):
        reduced.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, counted)
    accelerator.backward(wrapped(**inputs(accelerator.unwrap_model(wrapped), own_rows())).loss)
    accelerator, wrapped, _ = prepared(kind, plugin_of())
    with SentBytes() as seen:
        accelerator.backward(wrapped(**inputs(accelerator.unwrap_model(wrapped), own_rows())).loss)
    planned = {axis: parallel_plan(start(kind), {axis: dist.get_world_size()}).groups for axis in ("dp", "fsdp")}
    by_kind = {name: 0 for name in ("all_reduce", *seen.by_kind)}
    for collective in (each for groups in planned.values() for group in groups for each in group.collectives):
        by_kind[collective.kind] += collective.payload
    return {"counted": {"all_reduce": sum(reduced), **seen.by_kind}, "planned": by_kind}


CHECKPOINTED = ("llama two_way", "llama layers", "bart tied loss", "llama tied loss", "llama shared layers, relaxed")
LOADED_ON_META = (
    "llama two_way",
    "llama layers",
    "t5 three_way",
    "bert two_way",
    "encoder-decoder three_way",
    "llama CWT",
    "llama layers, relaxed",
)
CASES = {
    **{f"ddp, {kind}": partial(ddp, kind) for kind in KINDS},
    **{f"fsdp2, {kind}": partial(fsdp2, kind) for kind in KINDS},
    **{f"fsdp2 checkpointed, {kind}": partial(fsdp2, kind, activation_checkpointing=True) for kind in CHECKPOINTED},
    **{f"fsdp2 from meta, {kind}": partial(fsdp2, kind, cpu_ram_efficient_loading=True) for kind in LOADED_ON_META},
    **{f"fsdp2 compiled, {kind}": partial(compiled, kind) for kind in ("llama two_way", "llama tied loss")},
    "fsdp2 held, llama layers": partial(held, "llama layers"),
    **{f"bytes, {kind}": partial(sent, kind) for kind in COUNTED},
    "control, halved": partial(halved, "llama two_way"),
    "control, not reduced": partial(not_reduced, "llama two_way"),
    "control, not gathered": not_gathered,
}  # fmt: skip

if __name__ == "__main__":
    run_cases(CASES)
