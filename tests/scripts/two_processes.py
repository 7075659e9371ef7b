"""Ties under DDP (through Accelerate) and FSDP2, in two processes on the CPU: started by `run_script`."""

import tempfile

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_tying import assert_tied, tie
from tests.processes import run_cases
from tests.tiny import half_of_tiny_inputs, logits, tiny_inputs, tiny_model, without_dropout


def alone(arch: str, spec, **kwargs) -> torch.Tensor:
    """The logits after three steps of one process on the whole batch: the reference."""
    model = without_dropout(tie(tiny_model(arch, tie_word_embeddings=False), spec, **kwargs))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**tiny_inputs(model)).loss.backward()
        optimizer.step()
    return logits(model)


def drift(model, expected: torch.Tensor) -> float:
    return (logits(model) - expected).abs().max().item()


def ddp(arch: str, spec, **kwargs) -> dict:
    expected = alone(arch, spec, **kwargs)
    accelerator = Accelerator(cpu=True)
    model = without_dropout(tie(tiny_model(arch, tie_word_embeddings=False), spec, **kwargs))
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert_tied(wrapped)
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(wrapped(**half_of_tiny_inputs(model, accelerator.process_index)).loss)
        optimizer.step()
    assert_tied(wrapped)
    return {"drift": drift(model, expected)}


def fsdp2(arch: str, spec, separately: bool = False, **kwargs) -> dict:
    expected = None if separately else alone(arch, spec, **kwargs)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = without_dropout(tie(tiny_model(arch, tie_word_embeddings=False), spec, **kwargs))
    if separately:
        try:
            fully_shard(model.transformer.wte, mesh=mesh)
            fully_shard(model.lm_head, mesh=mesh)
            model(**half_of_tiny_inputs(model, dist.get_rank()))
        except ValueError as error:  # torch's, or a TyingError
            return {"error": str(error)}
        return {"error": None}
    fully_shard(model, mesh=mesh)  # the pair lies in one group, the root's
    assert_tied(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**half_of_tiny_inputs(model, dist.get_rank())).loss.backward()
        optimizer.step()
    assert_tied(model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    result = {}
    if dist.get_rank() == 0:
        with tempfile.TemporaryDirectory() as folder:
            fresh = tie(tiny_model(arch, tie_word_embeddings=False), spec, **kwargs)
            fresh.save_pretrained(folder, state_dict=state)
            loaded = type(fresh).from_pretrained(folder)
            assert_tied(loaded)
            result = {"drift": drift(loaded, expected)}
    dist.barrier()
    return result


MLP = ["transformer.h.0.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.weight"]
CASES = {
    "ddp, head": lambda: ddp("gpt2", "two_way", init_from="target"),
    "ddp, layers": lambda: ddp("gpt2", {"mlp": MLP}, init_from=MLP[0]),
    "ddp, bart untied": lambda: ddp("bart", "none"),
    "fsdp2, head": lambda: fsdp2("gpt2", "two_way", init_from="target"),
    "fsdp2, layers": lambda: fsdp2("gpt2", {"mlp": MLP}, init_from=MLP[0]),
    "fsdp2, pair torn apart": lambda: fsdp2("gpt2", "two_way", separately=True, init_from="target"),
}

if __name__ == "__main__":
    run_cases(CASES)
