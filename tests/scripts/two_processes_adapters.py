"""Tied-LoRA under DDP (through Accelerate), FSDP1 and FSDP2, in two processes on the CPU: started by `run_script`."""

import tempfile

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from tests.processes import run_cases
from tests.tied_lora import outputs, tied_lora
from tests.tiny import half_of_tiny_inputs, tiny_inputs, tiny_model


def fresh(**config):
    return tied_lora(tiny_model("llama"), **config).train()


def adapter_optimizer(model):
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)


def alone(**config) -> torch.Tensor:
    """The logits after three steps of one process on the whole batch: the reference."""
    model = fresh(**config)
    optimizer = adapter_optimizer(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(**tiny_inputs(model.get_base_model())).loss.backward()
        optimizer.step()
    return outputs(model.eval())


def ddp(**config) -> dict:
    expected = alone(**config)
    accelerator = Accelerator(cpu=True)
    model = fresh(**config)
    wrapped, optimizer = accelerator.prepare(model, adapter_optimizer(model))
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(wrapped(**half_of_tiny_inputs(model.get_base_model(), accelerator.process_index)).loss)
        optimizer.step()
    return {"drift": (outputs(model.eval()) - expected).abs().max().item()}


def fsdp1(use_orig_params: bool, **config) -> dict:
    """By PEFT's policy, which Trainer sets: each decoder layer is a unit, and each trained leaf."""
    expected = alone(**config)
    model = fresh(**config)
    base = model.get_base_model()
    policy = fsdp_auto_wrap_policy(model)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    optimizer = adapter_optimizer(wrapped)
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(**half_of_tiny_inputs(base, dist.get_rank())).loss.backward()
        optimizer.step()
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        state = {name.replace("_fsdp_wrapped_module.", ""): p.clone() for name, p in wrapped.named_parameters()}
    twin = fresh(**config)
    missing = twin.load_state_dict(state, strict=False).missing_keys
    units = sum(isinstance(module, FullyShardedDataParallel) for module in wrapped.modules())
    drift = (outputs(twin.eval()) - expected).abs().max().item()
    return {"drift": drift, "missing": missing, "units": units}


def fsdp2(leaves: bool = False, **config) -> dict:
    """One group for each decoder layer and one for the rest, as Accelerate makes them; with `leaves` one for each
    trained leaf too."""
    expected = alone(**config)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fresh(**config)
    trained = [m for m in model.modules() if not list(m.children()) and getattr(m, "weight", None) is not None]
    for leaf in trained if leaves else []:
        if leaf.weight.requires_grad:
            fully_shard(leaf, mesh=mesh)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = adapter_optimizer(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(**half_of_tiny_inputs(model.get_base_model(), dist.get_rank())).loss.backward()
        optimizer.step()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    result = {}
    if dist.get_rank() == 0:
        with tempfile.TemporaryDirectory() as folder:
            fresh(**config).save_pretrained(folder, state_dict=state)
            loaded = PeftModel.from_pretrained(tiny_model("llama"), folder).eval()
            result = {"drift": (outputs(loaded) - expected).abs().max().item()}
    dist.barrier()
    return result


CASES = {
    "ddp, TL6": lambda: ddp(),
    "ddp, TL5, all": lambda: ddp(variant="TL5", share_by="all", target_modules="all-linear"),
    "fsdp1, TL6": lambda: fsdp1(False),
    "fsdp1, TL6, original parameters": lambda: fsdp1(True),
    "fsdp1, TL5, all": lambda: fsdp1(False, variant="TL5", share_by="all", target_modules="all-linear"),
    "fsdp2, TL6": lambda: fsdp2(),
    "fsdp2, TL6, each leaf": lambda: fsdp2(leaves=True),
    "fsdp2, TL5, all": lambda: fsdp2(variant="TL5", share_by="all", target_modules="all-linear"),
}

if __name__ == "__main__":
    run_cases(CASES)
