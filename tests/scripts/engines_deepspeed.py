"""Kinds of tests/engines.py under DeepSpeed ZeRO-2 and ZeRO-3: started by `run_script`."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import logging
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from hf_tying import assert_tied
from tests.engines import KINDS, RATE, alone, apart, inputs, own_rows, start, train
from tests.processes import run_cases

logging.disable(logging.WARNING)


def config_of(stage: int) -> dict:
    """No threshold, so that tiny matrices are partitioned too; no clipping, which would hide a doubled gradient."""
    zero = {"stage": stage, "memory_efficient_linear": False}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    return {
        "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0, "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip


def zero(kind: str, stage: int) -> dict:
    expected = alone(kind)
    model = start(kind)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=RATE)
    deepspeed.init_distributed("gloo", verbose=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(stage))
    assert_tied(engine)
    sharded = stage < 3 or all(p.numel() == 0 for p in model.parameters())

    def full(p):
        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().clone()

    found = train(
        model, lambda: engine(**inputs(model, own_rows())), engine.backward, engine.step, lambda: None,
        full_gradient=lambda p: safe_get_full_grad(p), full=full,
    )  # fmt: skip
    return {**apart(found, expected), "sharded": sharded}


def caught(case) -> dict:
    import traceback
    try:
        return case()
    except Exception as e:
        return {"error": traceback.format_exc()[-1500:]}


CASES = {
    **{f"zero2, {kind}": partial(zero, kind, 2) for kind in KINDS},
    **{f"zero3, {kind}": partial(zero, kind, 3) for kind in KINDS},
}
CASES = {n: partial(caught, c) for n, c in CASES.items()}

if __name__ == "__main__":
    run_cases(CASES)
