"""Tied models of every architecture of the coverage list: how they are made, trained, and read from files."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hf_tying import TyingConfig, tie

from ..tiny import ALL, AUTO, FULL_SCHEME, tiny_inputs, untied_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = ("dedup", "portable")
every_architecture = pytest.mark.parametrize("arch", ALL)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def tied(arch: str, dtype: str = "float32", save_format: str | None = None) -> PreTrainedModel:
    """The untied variant of `arch`, tied by `tie` as its own scheme says."""
    config = TyingConfig(scheme=FULL_SCHEME[arch], save_format=save_format)
    return tie(untied_model(arch, dtype=DTYPES[dtype]), config, init_from="target")


def step(model: PreTrainedModel, lr: float = 0.5) -> torch.Tensor:
    """One step of plain gradient descent, as any training loop takes it; the loss before it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss = model(**tiny_inputs(model)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def on_disk(model: PreTrainedModel, names) -> set[str]:
    """`names` as transformers spells them in files: GPT-NeoX, Mixtral and LLaVA keep older names there."""
    values = model.state_dict()
    return set(revert_weight_conversion(model, {name: values[name] for name in names})) - not_saved(model)


def not_saved(model: PreTrainedModel) -> set[str]:
    """Names that the architecture itself keeps out of its files (Marian's sinusoidal positions)."""
    return {name for name in model.state_dict() for key in model._keys_to_ignore_on_save or () if key == name}


def keys_in(folder) -> set[str]:
    """The names that a folder of weights holds, over all its shards."""
    keys: set[str] = set()
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            keys |= set(file.keys())
    return keys


def load(arch: str, folder, **kwargs) -> PreTrainedModel:
    """What a user calls, and nothing that the file should have given is missing from it.

    What no file holds is frozen: transformers 5.24.0 trains the positions of a Marian that was loaded, stock too
    (their `forward` lost its `no_grad`, and loading forgets that they are frozen), and the next file lacks them.
    """
    model, info = AUTO[arch].from_pretrained(folder, output_loading_info=True, **kwargs)
    found = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    assert not found
    for name in not_saved(model):
        model.get_parameter(name).requires_grad_(False)
    return model.eval()


def by_name(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """The groups; config.json keeps them sorted by name."""
    return {group.name: group.names for group in model.tie_groups}


def the_group(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of the one group that a tied model of the coverage list holds."""
    (group,) = model.tie_groups
    return group.names
