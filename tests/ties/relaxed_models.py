"""Kinds of relaxed groups, the models and names that they are put on, and what training makes of them."""

import pytest
import torch

from hf_tying import (
    gap,
    tie,
)
from tests.tiny import tiny_inputs, tiny_model

KINDS = {
    "scale": {"kind": "scale"},
    "lora": {"kind": "lora", "rank": 3},
    "basis": {"kind": "basis", "filters": 2},
    "bounded": {"kind": "lora", "rank": 3, "bound": 0.05},
}
each_kind = pytest.mark.parametrize("relax", KINDS.values(), ids=KINDS)
#: A model, the names of a group in it with the root first.
GROUPS = {
    "llama": ["model.embed_tokens.weight", "lm_head.weight"],
    "gpt2": ["transformer.wte.weight", "lm_head.weight"],
    "gpt2 layers": ["transformer.h.0.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.weight"],
    "bert": ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"],
    "t5": ["shared.weight", "lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"],
}
each_group = pytest.mark.parametrize("place", GROUPS)


def untouched(place):
    torch.manual_seed(0)
    return tiny_model(place.split()[0]).eval()


def relaxed(place, relax, names=None):
    names = names or GROUPS[place]
    return tie(untouched(place), {"group": {"names": names, "relax": relax}}, init_from=names[0]).eval()


def trained(place, relax):
    """A model whose differences are not zero any more."""
    model = relaxed(place, relax)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        model(**tiny_inputs(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(0 < distance for distance in gap(model)["group"].values())
    return model
