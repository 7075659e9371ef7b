"""Tied models that the reports of this room are made of, and a plain count of a model's parameters."""

import pytest
import torch

from hf_tying import TyingConfig, tie

from ..tied_lora import tied_lora, two_adapters
from ..tiny import ALL, FULL_SCHEME, layer_pair, split, tiny_model, untied_model

FORMATS = ("dedup", "portable")
every_architecture = pytest.mark.parametrize("arch", ALL)


def tied(arch: str, save_format: str | None = None, dtype=torch.float32):
    config = TyingConfig(scheme=FULL_SCHEME[arch], save_format=save_format)
    return tie(untied_model(arch, dtype=dtype), config, init_from="target")


def layers_and_embeddings(save_format: str | None = None):
    """A Llama with two groups."""
    model = untied_model("llama")
    config = TyingConfig(scheme="two_way", groups={"layers": layer_pair(model)}, save_format=save_format)
    return tie(model, config, init_from="mean")


def plain_count(model) -> int:
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def shared_layers(layers: int, size: int):
    """A Llama whose layers are one in sets of `size`, and whose embeddings are tied."""
    model = tiny_model("llama", num_hidden_layers=layers, tie_word_embeddings=False)
    sets = {f"set_{i}": [f"model.layers.{j}" for j in range(i, i + size)] for i in range(0, layers, size)}
    groups = sets if len(sets) > 1 else {"layers": sets["set_0"]}
    return tie(model, TyingConfig(scheme="two_way", groups=groups), init_from="mean")


def broken(arch: str, name: str = "lm_head.weight"):
    """A tied model of which one name has a parameter of its own."""
    model = tied(arch)
    split(model, [name])
    return model


#: Models whose reports have every form: one group, three roles, whole layers, adapters, a broken tie, nothing.
MODELS = {
    **{arch: lambda arch=arch: tied(arch) for arch in ("gpt2", "albert", "bert", "t5", "bart", "llava")},
    "one set of layers": lambda: shared_layers(12, 12),
    "pairs of layers": lambda: shared_layers(12, 2),
    "40 layers": lambda: shared_layers(40, 4),
    "Tied-LoRA": lambda: tied_lora(tiny_model("llama", num_hidden_layers=40)),
    "two adapters": two_adapters,
    "broken": lambda: broken("bart"),
    "untied": lambda: untied_model("gpt2"),
}
every_form = pytest.mark.parametrize("form", MODELS)
