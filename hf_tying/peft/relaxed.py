"""`export_relaxed`: low-rank differences of relaxed ties as an ordinary LoRA adapter."""

import os
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import TyingError
from ..ties.relaxation import LowRank, relaxation_at, relaxed_names
from ..ties.sharding import whole
from ..ties.slots import find_slot
from ..ties.verify import tied_part
from .adapter_folder import write_adapter
from .tensor_names import BASE_PREFIX


def export_relaxed(model: nn.Module, out: str | os.PathLike[str]) -> Path:
    """Write the differences of relaxed members (`kind="lora"`) as a LoRA adapter for stock PEFT.

    The base model of the adapter is the exactly tied one: save `harden(copy.deepcopy(model))` for it. Loaded on that,
    the adapter computes the same logits. `lora_alpha` equals the rank, so nothing is scaled.

    Args:
        model: model whose relaxed members are weights of `nn.Linear`, `nn.Embedding` or GPT-2's `Conv1D`.
        out: folder for `adapter_config.json` and `adapter_model.safetensors`. It is made if it does not exist.

    Returns:
        `out`.

    Raises:
        TyingError: a model without relaxed members, one with members of another kind or with a bound, or with members
            that LoRA does not adapt; nothing is written.
    """
    return write_adapter(*relaxed_adapter(model), out)


def relaxed_adapter(model: nn.Module) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The settings of the adapter of `export_relaxed`, and its tensors by their names in a file.

    Raises:
        TyingError: see there.
    """
    part = tied_part(model)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for _, _, name in relaxed_names(part):
        relaxation, module = relaxation_at(part, name), find_slot(part, name)
        assert relaxation is not None and module is not None
        place, _, attribute = name.rpartition(".")
        fits = isinstance(module[0], nn.Linear | nn.Embedding | Conv1D) and attribute == "weight"
        if not isinstance(relaxation, LowRank) or relaxation.bound is not None or not fits:
            raise TyingError(
                f"Cannot export {name!r}, of a {type(module[0]).__name__} relaxed by {relaxation.settings}: expected "
                "the weight of a Linear or an Embedding, relaxed by 'lora' without a bound. Save the model as it is: "
                "its file has the whole matrices."
            )
        thin_a, thin_b = whole(relaxation.lora_A.detach()), whole(relaxation.lora_B.detach())
        if isinstance(module[0], nn.Embedding):  # PEFT multiplies these the other way round
            named = {"lora_embedding_A": thin_b.T, "lora_embedding_B": thin_a.T}
        elif isinstance(module[0], Conv1D):  # which has the transposed weight
            named = {"lora_A.weight": thin_b.T, "lora_B.weight": thin_a.T}
        else:
            named = {"lora_A.weight": thin_a, "lora_B.weight": thin_b}
        tensors |= {f"{BASE_PREFIX}{place}.{key}": value.contiguous() for key, value in named.items()}
        ranks[place] = thin_a.shape[0]
    if not tensors:
        raise TyingError(
            f"{type(part).__name__} has no relaxed member to export: tie(model, {{'group': {{'names': [...], 'relax': "
            "{'kind': 'lora'}}}) makes one."
        )
    rank = max(ranks.values())
    config = LoraConfig(r=rank, lora_alpha=rank, rank_pattern=ranks, alpha_pattern=dict(ranks), inference_mode=True)
    config.target_modules = list(ranks)
    config.fan_in_fan_out = any(isinstance(part.get_submodule(place), Conv1D) for place in ranks)
    return config, tensors
