"""What takes a model: called on a whole one, and on the same one that DeepSpeed ZeRO-3 has partitioned.

`CALLS` gives what it gives on the whole one. `REFUSED` is refused in a sentence, before anything is changed.
"""

import copy
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from hf_tying import (
    fold,
    gap,
    harden,
    load_tied,
    merge_projection,
    relaxation_penalty,
    save_tied,
    share_layers,
    tie,
    tying_report,
    unroll,
    untie,
    use_projection,
)
from hf_tying.config import RELAXATIONS
from hf_tying.diagnostics import diagnose
from hf_tying.parallel import parallel_plan
from hf_tying.peft import TiedLoraConfig
from hf_tying.training import average_into, discriminative_parameters, recover_lm_head
from hf_tying.training.averaging import Averaging
from hf_tying.vocabularies import join_vocabularies

from .engines import projected, relaxed
from .tiny import untied_model

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def loosely(kind: str) -> PreTrainedModel:
    return relaxed("llama", [EMBED, HEAD], kind=kind, bound=0.5).float()


STARTS: dict[str, Callable[[], PreTrainedModel]] = {
    "untied": lambda: untied_model("llama"),
    "tied": lambda: tie(untied_model("llama"), "two_way", init_from="output"),
    "projected": lambda: projected("llama").float(),
    "shared": lambda: share_layers(untied_model("llama"), order=[0, 0]),
    "unrolled": lambda: unroll(share_layers(untied_model("llama"), order=[0, 0])),
    **{kind: lambda kind=kind: loosely(kind) for kind in RELAXATIONS},
}


def penalty(model: PreTrainedModel) -> float:
    with torch.no_grad():
        return relaxation_penalty(model).item()


def relaxed_from_its_values(model: PreTrainedModel) -> dict:
    relax = {"kind": "lora", "rank": 2, "init": "svd"}
    return gap(tie(model, {"embeddings": {"names": [EMBED, HEAD], "relax": relax}}, init_from="target"))


def report(model: PreTrainedModel) -> dict:
    return tying_report(model).to_dict()


def plan(model: PreTrainedModel) -> int:
    return parallel_plan(model, {"dp": 2}).sent


def decayed(model: PreTrainedModel) -> list:
    groups = discriminative_parameters(model, 1e-3, weight_decay=0.1)
    return [[len(group["params"]), group["weight_decay"]] for group in groups]


def moved(model: PreTrainedModel) -> list[float]:
    """The average of a model and its double."""
    with whole(model):
        averaged = copy.deepcopy(model)
    with torch.no_grad(), whole(model):
        for parameter in model.parameters():
            parameter.mul_(2)
    average_into(averaged, model, 0.5)
    return [p.sum().item() for p in averaged.parameters()]


def averaged(model: PreTrainedModel) -> list[float]:
    averaging = Averaging(model, patience=0)
    averaging.evaluated(1.0)
    averaging.evaluated(2.0)
    averaging.updated()
    averaging.finish()
    return [value.sum().item() for value in (averaging.mean or {}).values()]


def saved(model: PreTrainedModel) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        save_tied(model.model.layers[0].mlp, folder)
        return {name: value.sum().item() for name, value in load_file(f"{folder}/model.safetensors").items()}


def loaded(model: PreTrainedModel) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_tied(model.model.layers[1].mlp, folder)
        load_tied(model.model.layers[0].mlp, folder)


def merged(model: PreTrainedModel, gather: bool = True) -> list:
    torch.manual_seed(0)
    model = get_peft_model(model, TiedLoraConfig(r=2, target_modules=["q_proj"]))
    if gather:
        with whole(model):
            model.merge_adapter()
    else:
        model.merge_adapter()
    return []


def whole(model: torch.nn.Module) -> Any:
    """Inside this context all parameters of `model` are whole; who changes them, changes them on all processes."""
    deepspeed = sys.modules["deepspeed"]
    return deepspeed.zero.GatheredParameters([*model.parameters()], modifier_rank=0)


CALLS: dict[str, tuple[str, Callable[[PreTrainedModel], Any]]] = {
    **{f"gap, {kind}": (kind, gap) for kind in RELAXATIONS},
    "penalty": ("basis", penalty),
    **{f"resize, {kind}": (kind, lambda model: model.resize_token_embeddings(50) and None) for kind in RELAXATIONS},
    "harden": ("lora", lambda model: harden(model) and None),
    "untie": ("basis", lambda model: untie(model) and None),
    "tie, relaxed": ("untied", relaxed_from_its_values),
    "use_projection": ("untied", lambda model: use_projection(model) and None),
    "unroll": ("shared", lambda model: unroll(model) and None),
    "merge_projection": ("projected", lambda model: merge_projection(model) and None),
    "report": ("tied", report),
    "plan": ("tied", plan),
    "diagnose": ("untied", lambda model: diagnose(model, model).to_dict()),
    "weight decay": ("tied", decayed),
    "average_into": ("tied", moved),
    "averaged SGD": ("tied", averaged),
    "save_tied": ("untied", saved),
    "load_tied": ("untied", loaded),
    "recover_lm_head": ("untied", lambda model: recover_lm_head(model, how="clone") and None),
    "merge_adapter": ("tied", merged),
}
#: What makes parameters, which an engine does not know: refused after `deepspeed.initialize`, as `NEW` says.
NEW_PARAMETERS = ("untie", "tie, relaxed", "use_projection", "resize, lora")
NEW = r"would not know the new parameters\. Do it before deepspeed\.initialize"
#: With what the refusal says.
REFUSED: dict[str, tuple[str, Callable[[PreTrainedModel], Any], str]] = {
    "penalty with a gradient": ("lora", relaxation_penalty, r"no gradient .* within torch\.no_grad\(\) its value"),
    "share_layers": ("untied", lambda model: share_layers(model, order=[0, 0]), "share the layers .* in one process"),
    "fold": ("unrolled", fold, "Cannot fold .* in one process"),
    "join": ("untied", lambda model: join_vocabularies(model, None), "join the vocabularies .* in one process"),
    "save_pretrained": (
        "tied", lambda model: model.save_pretrained("/nowhere/else"), r"Cannot save .* state_dict=accelerator\.",
    ),
    "average_into an empty copy": (
        "tied", lambda model: average_into(copy.deepcopy(model), model, 0.5), "The copy has no values: .*Gathered",
    ),
    "merge_adapter into parts": ("tied", lambda model: merged(model, gather=False), "Cannot merge: .* in one process"),
}  # fmt: skip
#: What is called after `deepspeed.initialize` too.
IN_ENGINE = (*NEW_PARAMETERS, "gap, lora", "harden", "diagnose", "save_tied", "load_tied")
