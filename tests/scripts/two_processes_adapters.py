"""Tied-LoRA under DDP (through Accelerate) and FSDP2, in two processes on the CPU: started by `run_script`."""

import tempfile

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

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


def fsdp2(**config) -> dict:
    """One group for each decoder layer and one for the rest, as Accelerate makes them."""
    expected = alone(**config)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fresh(**config)
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
    "fsdp2, TL6": lambda: fsdp2(),
    "fsdp2, TL5, all": lambda: fsdp2(variant="TL5", share_by="all", target_modules="all-linear"),
}

if __name__ == "__main__":
    run_cases(CASES)
