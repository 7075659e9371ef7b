"""Values that are not there, or cannot be read, are never equal: a `TyingError` names the case."""

import pytest
import torch
from torch import nn

from hf_tying import TyingError, assert_tied, tie
from hf_tying.ties.slots import same_values

from ..tiny import untied_model

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def shard(rows: int = 64, width: int = 16) -> nn.Parameter:
    """What DeepSpeed ZeRO-3 leaves of a partitioned parameter in a process that has no part of it."""
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_numel = rows * width
    return parameter


def partitioned(tied: bool):
    model = untied_model("llama")
    model.model.embed_tokens.weight = shard()
    model.lm_head.weight = model.model.embed_tokens.weight if tied else shard()
    return model


@pytest.mark.parametrize("init_from", [None, "output", "mean"])
def test_partitioned_matrices_are_not_tied_by_their_empty_shards(init_from):
    model = partitioned(tied=False)
    before = model.lm_head.weight
    with pytest.raises(
        TyingError, match="Cannot tie 'model.embed_tokens.weight': it is partitioned by DeepSpeed ZeRO-3"
    ):
        tie(model, "two_way", init_from=init_from)
    assert model.lm_head.weight is before and "tie_groups" not in vars(model)


def test_one_partitioned_matrix_is_tied_and_has_not_no_rows():
    model = partitioned(tied=True)
    assert_tied(model)
    assert_tied(tie(model, "two_way"))


@pytest.mark.parametrize("a, b", [(shard(), shard()), (shard(), torch.empty(0)), (torch.zeros(64, 16), shard())])
def test_a_shard_is_compared_with_nothing(a, b):
    with pytest.raises(TyingError, match="cannot be compared: one is partitioned"):
        same_values(a, b)
    assert same_values(a, a)  # one and the same object needs no values


class Quantised(torch.Tensor):
    """A tensor of a quantiser: it takes part in products, and in no comparison."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.equal, torch.Tensor.__eq__):
            raise NotImplementedError(f"no {func} for a quantised tensor")
        return super().__torch_function__(func, types, args, kwargs or {})


Quantised.__module__ = "torchao.quantization"


def quantised(model, name: str) -> None:
    module = model.get_submodule(name.rpartition(".")[0])
    parameter = nn.Parameter(module.weight.detach().as_subclass(Quantised), requires_grad=False)
    module._parameters["weight"] = parameter


def test_matrices_that_were_quantised_apart_are_told_and_not_compared():
    model = tie(untied_model("llama"), "two_way", init_from="output")
    for name in (EMBED, HEAD):
        quantised(model, name)
    with pytest.raises(TyingError, match="found two .*is quantised"):
        assert_tied(model)
    ids = torch.arange(8)[None]
    with pytest.raises(TyingError, match="is quantised"):
        model.train()(input_ids=ids, labels=ids)
    assert model.eval()(input_ids=ids).logits.shape == (1, 8, 64)  # as a stock model


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_a_quantised_side_is_refused_before_anything_is_changed(name):
    model = untied_model("llama")
    quantised(model, name)
    with pytest.raises(TyingError, match="quantised.*Tie before quantising"):
        tie(model, "two_way", init_from="target")
    assert "tie_groups" not in vars(model)
