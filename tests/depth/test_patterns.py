"""Shared layers: every pattern on many architectures, beside the plain model that it is unrolled to."""

import os

import pytest
import torch

from hf_tying import (
    assert_tied,
    fold,
    share_layers,
    unroll,
)
from hf_tying.depth.patterns import PATTERNS, order_of

from .models import output, parameters, plain

ARCHITECTURES = ["llama", "qwen3", "gpt2", "opt", "bert", "modernbert", "gemma3_text", "mamba", "t5", "bart"]
UNIQUE = {"sandwich": 3, "middle_cycle": 3, "all": 1}
#: Each pattern on a decoder and on two stacks, two of them on each other architecture; all with ZOO=1.
CASES = [
    (name, pattern)
    for name in [*ARCHITECTURES, "vision", "speech"]
    for pattern in PATTERNS
    if os.environ.get("ZOO") or name in ("llama", "bart") or pattern in ("cycle", "sandwich")
]


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_every_pattern_is_shared_saved_unrolled_and_folded(name, pattern, tmp_path):
    model = share_layers(plain(name), pattern, UNIQUE.get(pattern, 2), init="average")
    assert_tied(model)
    before, few = output(model), parameters(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert_tied(loaded)
    assert torch.equal(output(loaded), before) and parameters(loaded) == few
    assert loaded.config.tying == model.config.tying and loaded.config.tying["version"] == 2
    assert unroll(model) is model
    assert_tied(model)
    assert torch.equal(output(model), before)
    assert parameters(model) == parameters(plain(name))
    fold(model)
    assert_tied(model)
    assert torch.equal(output(model), before) and parameters(model) == few


def test_the_orders_are_those_of_the_papers():
    orders = {pattern: order_of(pattern, 6, {"sandwich": 3, "all": 1}.get(pattern, 3)) for pattern in PATTERNS}
    assert orders == {
        "sequence": [0, 0, 1, 1, 2, 2], "cycle": [0, 1, 2, 0, 1, 2], "cycle_rev": [0, 1, 2, 2, 1, 0],
        "sandwich": [0, 1, 1, 1, 1, 2], "middle_cycle": [0, 1, 1, 1, 1, 2], "immediate": [0, 0, 1, 1, 2, 2],
        "all": [0, 0, 0, 0, 0, 0],
    }  # fmt: skip
    assert order_of("middle_cycle", 8, 4) == [0, 1, 2, 1, 2, 1, 2, 3]
    # As in the authors' code: every block once, before the way back.
    assert order_of("cycle_rev", 6, 4) == [0, 1, 2, 3, 3, 2] and order_of("cycle_rev", 7, 3) == [0, 1, 2, 0, 2, 1, 0]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_generation_with_a_cache_is_that_without(pattern):
    model = share_layers(plain(), pattern, UNIQUE.get(pattern, 2))
    ids = torch.tensor([[3, 4, 5]])
    found = []
    for cache in (True, False):
        options = {"use_cache": cache, "output_logits": True, "return_dict_in_generate": True}
        found.append(model.generate(ids, max_new_tokens=6, do_sample=False, **options))
    with_cache, without = found
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(torch.cat(with_cache.logits), torch.cat(without.logits), atol=1e-5, rtol=1e-5)
