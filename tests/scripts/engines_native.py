"""Models that transformers itself splits, by `from_pretrained(distributed_config=)`: started by `run_script`."""

import os
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import ModelOutput

from hf_tying import TyingError, assert_tied, tie, use_tied_loss
from hf_tying.losses import log_probs
from hf_tying.objectives import AugmentedObjective
from hf_tying.objectives.fused_head import add_fused_head
from tests.engines import RATE, beside_one, inputs, own_rows, start, train
from tests.processes import run_cases
from tests.tiny import tiny_inputs, tiny_model

FOLDER = os.path.dirname(os.environ["RENDEZVOUS"].removeprefix("file://"))
SIZE = int(os.environ["WORLD_SIZE"])


def saved(model, name: str) -> str:
    folder = f"{FOLDER}/{name}".replace(" ", "_")
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return folder


def loaded(kind: str, **sizes):
    """A model of its file, split. The tied loss is asked for again: a file of it may be meant for other processes."""
    folder = saved(start(kind), f"{kind} {sizes}")
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**sizes), dtype=torch.float64
    )
    return (use_tied_loss(model) if kind.endswith("tied loss") else model).train()


def full(tensor):
    return tensor if tensor is None or not hasattr(tensor, "full_tensor") else tensor.full_tensor()


def trained(kind: str, **sizes) -> dict:
    """Two steps, then a save that one process loads."""
    model = loaded(kind, **sizes)
    rows = own_rows() if "fsdp_size" in sizes else slice(None)  # the processes of one copy have the same batch
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    units = sum(isinstance(module, FSDPModule) for module in model.modules())
    split = hasattr(model.lm_head.weight, "device_mesh") and model.lm_head.weight.to_local().shape[0] < 64
    found = train(
        model, lambda: model(**inputs(model, rows)), lambda loss: loss.backward(), optimizer.step,
        optimizer.zero_grad, full_gradient=lambda p: full(p.grad), full=lambda p: full(p.detach()).clone(),
    )  # fmt: skip
    folder = f"{FOLDER}/again {kind} {sizes}".replace(" ", "_")
    model.save_pretrained(folder)
    dist.barrier()
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert_tied(again)
    reloaded = max((p - found.weights[name]).abs().max().item() for name, p in again.named_parameters())
    return {**beside_one(found, kind), "split": split, "units": units, "reloaded": reloaded}


def objective() -> dict:
    model = loaded("llama two_way", tp_size=SIZE)
    use_tied_loss(model, objective=AugmentedObjective())
    try:
        model(**inputs(model))
    except TyingError as error:
        return {"error": str(error)}
    return {"error": None}


@dataclass
class FusedCausalLMOutput(ModelOutput):
    """As TRL's, which is not imported here."""

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def add_fused_lm_head(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=()):
    raise AssertionError("the model answers itself")


def fused() -> dict:
    """TRL's question to a split model, beside the same model in one process: each output, and a gradient."""
    whole, found, split = start("llama tied loss").train(), [], []
    for model in (loaded("llama tied loss", tp_size=SIZE), whole):
        add_fused_head(add_fused_lm_head, (model, 0.7, False, ("log_probs", "entropy", "mean_logits")), {})
        with mock.patch.object(log_probs, "own_part", wraps=log_probs.own_part) as own:
            answer = model(**inputs(model), fused_lm_head=True)
        split.append(own.called)
        (answer.loss - 0.1 * answer.entropy.mean()).backward()
        found.append([answer.log_probs, answer.entropy, answer.mean_logits, full(model.lm_head.weight.grad)])
    apart = max((a - b).abs().max().item() for a, b in zip(*found, strict=True))
    return {"apart": apart, "split": split}


def not_divided() -> dict:
    """Rows that transformers' own FSDP2 cannot cut into equal parts: what training says, and after the way out."""
    whole, found = tiny_model("llama", vocab_size=64 * SIZE + 1, dtype=torch.float64, tie_word_embeddings=True), []
    tie(whole, "two_way")
    for name in ("not divided", "padded"):
        model = AutoModelForCausalLM.from_pretrained(
            saved(whole, name), distributed_config=DistributedConfig(fsdp_size=SIZE), dtype=torch.float64
        )
        batch = inputs(model, own_rows())
        with torch.no_grad():
            evaluated = model.eval()(**batch).loss.item()
        try:
            found.append(abs(model.train()(**batch).loss.item() - evaluated))
            assert_tied(model)  # while each unit has a gathered matrix of its own
        except TyingError as error:
            found.append(str(error))
        whole.resize_token_embeddings(pad_to_multiple_of=SIZE)
    return {"found": found}


def pipelined(kind: str) -> dict:
    model = loaded(kind, pp_size=SIZE).eval()
    batch = {name: value for name, value in tiny_inputs(model).items() if name != "labels"}
    with torch.no_grad():
        logits = model(**batch).logits
    expected = start(kind).eval()(**batch).logits
    try:
        model.train()(**tiny_inputs(model))
        error = None
    except TyingError as raised:
        error = str(raised)
    return {"logits": (logits - expected).abs().max().item(), "error": error}


KINDS = ("llama two_way", "llama layers", "llama tied loss", "llama untied, tied loss")
CASES = {
    **{f"tp, {kind}": partial(trained, kind, tp_size=SIZE) for kind in KINDS},
    **{f"fsdp, {kind}": partial(trained, kind, fsdp_size=SIZE) for kind in KINDS[:3]},
    "fsdp, not divided": not_divided,
    "tp, objective": objective,
    "tp, fused": fused,
    "pp, llama two_way": partial(pipelined, "llama two_way"),
    "pp, llama layers": partial(pipelined, "llama layers"),
}  # fmt: skip

if __name__ == "__main__":
    run_cases(CASES)
