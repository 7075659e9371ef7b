"""The public functions that take a model, on a whole one and on one that several processes wrap or split.

Each either does on both what it does on one, or refuses by a `TyingError` on every process, and has changed nothing.
"""

import json
import os
from collections.abc import Callable
from functools import cache
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from packaging import version
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from hf_tying import (
    TyingError,
    fold,
    gap,
    harden,
    merge_projection,
    relaxation_penalty,
    share_layers,
    tie,
    tying_report,
    unroll,
    untie,
    use_projection,
)
from hf_tying.diagnostics import diagnose
from hf_tying.parallel import parallel_plan
from hf_tying.peft import export_to_lora
from hf_tying.training import average_into, layer_groups
from hf_tying.training.roles import measured_roles

from .engines import inputs, projected, relaxed, stock
from .tied_lora import tied_lora
from .tiny import layer_pair, tiny_model, untied_model

FOLDER = os.path.dirname(os.environ.get("RENDEZVOUS", "").removeprefix("file://"))
Found = dict[str, torch.Tensor | str]


def full(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def inner(model: nn.Module) -> PreTrainedModel:
    return model.module if isinstance(model, DistributedDataParallel) else model


def trained(model: nn.Module) -> Found:
    """Loss, gradients and values of a step, and what the config says of ties."""
    model.train().zero_grad()
    loss = model(**inputs(inner(model))).loss
    loss.backward()
    named = dict(inner(model).named_parameters())
    found = {f"gradient of {name}": full(p.grad) for name, p in named.items() if p.grad is not None}
    return found | {"loss": full(loss), **values(model)}


def values(model: nn.Module) -> Found:
    named = inner(model).named_parameters(remove_duplicate=False)
    return {"tying": json.dumps(inner(model).config.tying, sort_keys=True), **{name: full(p) for name, p in named}}


def through_the_projection(model: nn.Module) -> Found:
    """Without labels: the penalty of the projection counts the words of all processes."""
    logits = model.train()(input_ids=inputs(inner(model))["input_ids"]).logits
    logits.square().mean().backward()
    named = inner(model).named_parameters()
    return {"logits": full(logits), **{name: full(p.grad) for name, p in named if p.grad is not None}}


def norms(model: nn.Module) -> Found:
    model.train()
    with measured_roles(model) as meter:
        model(**inputs(inner(model))).loss.backward()
    return {name: torch.tensor(value) for name, value in meter.norms().items()}


def penalty(model: nn.Module) -> Found:
    term = relaxation_penalty(model)
    term.backward()
    named = inner(model).named_parameters()
    return {"term": full(term), **{name: full(p.grad) for name, p in named if p.grad is not None}}


def averaged(model: nn.Module) -> Found:
    copy = two_way()
    with torch.no_grad():
        copy.lm_head.weight.zero_()
    average_into(copy, model, 0.9)
    return values(copy)


def exported(model: nn.Module) -> Found:
    folder = f"{FOLDER}/lora of {type(model).__name__} {dist.get_rank()}"
    return {"file": (export_to_lora(model, folder) / "adapter_model.safetensors").read_bytes().hex()}


def changed(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], Found]:
    return lambda model: [change(model), trained(model)][1]


def projection() -> PreTrainedModel:
    return projected("llama")


def tied_adapter() -> nn.Module:
    return tied_lora(tiny_model("llama", dtype=torch.float64)).double()


def untied() -> PreTrainedModel:
    return stock("llama", "none")


def two_way() -> PreTrainedModel:
    return stock("llama", "two_way")


def shared() -> PreTrainedModel:
    return share_layers(untied_model("llama", dtype=torch.float64), order=[0, 0])


def unrolled() -> PreTrainedModel:
    return unroll(shared())


def scaled() -> PreTrainedModel:
    return relaxed("llama", ["model.embed_tokens.weight", "lm_head.weight"], kind="scale")


def low_rank() -> PreTrainedModel:
    return relaxed("llama", layer_pair(untied_model("llama")), kind="lora", rank=2)


PAIR = layer_pair(untied_model("llama"))
#: Functions that read a model, or change its values alone: they do the same on all.
READS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Found]]] = {
    "nothing": (two_way, trained),
    "projection": (projection, through_the_projection),
    "tying_report": (two_way, lambda model: {"report": str(tying_report(model).to_dict())}),
    "parallel_plan": (two_way, lambda model: {"plan": str(parallel_plan(model, {"fsdp": 8}).to_dict())}),
    "diagnose": (two_way, lambda model: {"logs": str(diagnose(model, untied()).to_dict())}),
    "diagnose, the twin": (untied, lambda model: {"logs": str(diagnose(two_way(), model).to_dict())}),
    "average_into": (two_way, averaged),
    "layer_groups": (two_way, lambda model: {"groups": str({k: len(v) for k, v in layer_groups(model).items()})}),
    "measured_roles": (two_way, norms),
    "measured_roles, visits": (shared, norms),
    "gap": (low_rank, lambda model: {"gap": torch.tensor([*gap(model)["relaxed"].values()])}),
    "relaxation_penalty": (scaled, penalty),
    "harden": (scaled, changed(harden)),
    "export_to_lora": (low_rank, exported),
    "export_to_lora, Tied-LoRA": (tied_adapter, exported),
    "tying_report, Tied-LoRA": (tied_adapter, lambda model: {"report": str(tying_report(model).to_dict())}),
    "tie, tied so": (two_way, changed(lambda model: tie(inner(model), "two_way"))),
    "resize, as it is": (two_way, changed(lambda model: inner(model).resize_token_embeddings(64))),
}  # fmt: skip
#: Functions that change what is a parameter: they do the same where every process has the whole model.
CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Found]]] = {
    "tie": (untied, changed(lambda model: tie(model, "two_way", init_from="mean"))),
    "tie layers": (untied, changed(lambda model: tie(model, {"layers": PAIR}, init_from="mean"))),
    "untie": (two_way, changed(untie)),
    "untie relaxed": (scaled, changed(untie)),
    "relax": (
        untied,
        changed(lambda model: tie(model, {"a": {"names": PAIR, "relax": {"kind": "scale"}}}, init_from="mean")),
    ),
    "share_layers": (untied, changed(lambda model: share_layers(model, order=[0, 0], init="average"))),
    "unroll": (shared, changed(unroll)),
    "fold": (unrolled, changed(fold)),
    "use_projection": (two_way, changed(use_projection)),
    "merge_projection": (projection, changed(merge_projection)),
    "resize": (two_way, changed(lambda model: model.resize_token_embeddings(62, mean_resizing=False))),
    "resize relaxed": (scaled, changed(lambda model: model.resize_token_embeddings(62, mean_resizing=False))),
    "set_input_embeddings": (
        two_way, changed(lambda model: model.set_input_embeddings(nn.Embedding(64, 16, dtype=torch.float64))),
    ),
}  # fmt: skip
#: Changes that tensor parallelism allows: it has no units, and a tie of two matrices that are split alike is one.
#: transformers 5.17 splits one of the two.
UNDER_TP = ("tie", "untie", "unroll")[version.parse(transformers.__version__) < version.parse("5.23") :]
#: Kinds that it cannot have.
NOT_UNDER_TP = ("gap", "relaxation_penalty", "harden", "export_to_lora", "untie relaxed", "resize relaxed")


def sharded(make: Callable[[], nn.Module]) -> nn.Module:
    return fully_shard(make(), mesh=init_device_mesh("cpu", (2,)))


@cache
def saved(make: Callable[[], nn.Module]) -> str:
    """A folder with the model of `make`, which process 0 has written."""
    folder = f"{FOLDER}/{saved.cache_info().misses}"
    if dist.get_rank() == 0:
        make().save_pretrained(folder)
    dist.barrier()
    return folder


def tensor_parallel(make: Callable[[], nn.Module]) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        saved(make), distributed_config=DistributedConfig(tp_size=2), dtype=torch.float64
    )


FORMS: dict[str, Callable[[Callable[[], nn.Module]], nn.Module]] = {
    "DDP": lambda make: DistributedDataParallel(make()),
    "FSDP2": sharded,
    "TP": tensor_parallel,
}
#: What is left out: methods that a wrapper does not have, and what is refused as others are.
LEFT_OUT = {
    "DDP": ("resize", "resize relaxed", "set_input_embeddings"),
    "FSDP2": ("untie relaxed", "tie layers"),
    "TP": (
        "share_layers", "fold", "merge_projection", "set_input_embeddings", "tie layers", "resize, as it is",
        "export_to_lora, Tied-LoRA", "tying_report, Tied-LoRA",
    ),
}  # fmt: skip
PAIRS = [(form, name) for form in FORMS for name in READS | CHANGES if name not in LEFT_OUT[form]]
#: How the refusal of each form begins, and its way out.
REFUSED = {
    "DDP": r"^Cannot .* a DistributedDataParallel: .* give that one, before it is wrapped",
    "FSDP2": r"^Cannot .* LlamaForCausalLM: its parameters are split .* before accelerator.prepare\(model\)",
    "TP": r"^Cannot .* (split .* without distributed_config|its ties are relaxed.*DDP or FSDP2)\.$",
}


def refused(form: str, name: str) -> bool:
    """Whether the function is refused on a model of this form."""
    return form == "TP" and name in NOT_UNDER_TP or name in CHANGES and not (form == "TP" and name in UNDER_TP)


@cache
def alone(name: str) -> Found:
    with mock.patch("torch.distributed.is_initialized", return_value=False):
        return attempt(*(READS | CHANGES)[name], lambda make: make())


def attempt(make: Callable[[], nn.Module], act: Callable[[nn.Module], Found], form: Callable) -> Found:
    torch.manual_seed(0)
    model = form(make)
    torch.manual_seed(1)
    return act(model)


def beside_whole(form: str, name: str) -> dict:
    """What both processes have found, by how much it differs from a whole model; or their error, and what changed."""
    held = []

    def kept(make: Callable[[], nn.Module]) -> nn.Module:
        model = FORMS[form](make)
        if refused(form, name):
            held.extend([model, values(model)])
        return model

    try:
        told = {"found": attempt(*(READS | CHANGES)[name], kept)}
    except Exception as error:  # of another kind is none of ours: the test of this case says so
        said = str(error) if isinstance(error, TyingError) else f"{type(error).__name__}: {error}"
        told = {"error": said, "changed": apart(values(held[0]), held[1]) if held else 0.0}
    every = [None, None]
    dist.all_gather_object(every, told)
    if dist.get_rank() or "error" in told:  # process 0 compares
        return told | {"same on both": every[0] == every[1]} if "error" in told else {}
    differences = [apart(each["found"], alone(name)) if "found" in each else float("inf") for each in every]
    return {"apart": max(differences)}


def apart(found: Found, expected: Found) -> float:
    if found.keys() != expected.keys():
        return float("inf")
    texts = [name for name, value in found.items() if isinstance(value, str)]
    if any(found[name] != expected[name] for name in texts) or any(
        found[name].shape != expected[name].shape for name in found.keys() - texts
    ):
        return float("inf")
    return max([(found[name] - expected[name]).abs().max().item() for name in found.keys() - texts], default=0.0)


def results() -> dict:
    return {f"{name}, {form}": beside_whole(form, name) for form, name in PAIRS}
