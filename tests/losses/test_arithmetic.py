"""The dtypes that the losses compute in."""

import pytest
import torch

from hf_tying.losses.arithmetic import has_fast_half


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cpu_is_asked_whether_it_multiplies_half_precision_fast(monkeypatch, dtype):
    assert has_fast_half(dtype) in (True, False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())  # a build without
    assert has_fast_half(dtype) is False
