"""Tied models that the reports of this room are made of, and a plain count of a model's parameters."""

import pytest
import torch

from hf_tying import TyingConfig, tie

from ..tiny import ALL, FULL_SCHEME, layer_pair, untied_model

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
