"""Kinds of tests/engines.py under DeepSpeed ZeRO-2 and ZeRO-3: started by `run_script`."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import copy
import logging
from functools import cache, partial
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.utils import safe_get_full_grad
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

import hf_tying.models
from hf_tying import TyingConfig, TyingError, assert_tied, tie, untie
from hf_tying.ties.slots import find_parameter
from tests.engines import KINDS, RATE, Trained, beside, beside_one, inputs, own_rows, start, train, trained_alone
from tests.partitioned_calls import CALLS, IN_ENGINE, REFUSED, STARTS
from tests.processes import run_cases
from tests.tiny import layer_pair, untied_model, without_dropout

told: list[str] = []
FOLDER = os.path.dirname(os.environ["RENDEZVOUS"].removeprefix("file://"))


class Told(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())


logging.getLogger("hf_tying").addHandler(Told())


def config_of(stage: int) -> dict:
    """No threshold, so that tiny matrices are partitioned too; no clipping, which would hide a doubled gradient."""
    zero = {"stage": stage, "memory_efficient_linear": False}
    if stage == 3:
        limits = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
        zero |= {f"stage3_{limit}": 0 for limit in limits}
    return {
        "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0, "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip


def joined(case):
    """`case`, after DeepSpeed has joined the group."""
    deepspeed.init_distributed("gloo", verbose=False)
    return case()


def zero(kind: str, stage: int) -> dict:
    found, _, partitioned = trained(start(kind), stage)
    return {**beside_one(found, kind), "partitioned": partitioned}


def trained(model: PreTrainedModel, stage: int) -> tuple[Trained, deepspeed.DeepSpeedEngine, bool]:
    """Two steps of `model`: what they made, the engine, and whether it had partitioned every parameter."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(stage))
    assert_tied(engine)
    partitioned = all(p.numel() == 0 for p in model.parameters())
    found = train(
        model, lambda: engine(**inputs(model, own_rows())), engine.backward, engine.step, lambda: None,
        full_gradient=lambda p: safe_get_full_grad(p), full=full,
    )  # fmt: skip
    return found, engine, partitioned


def full(parameter: torch.Tensor) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def split_from_the_start(kind: str, fresh: bool) -> dict:
    """A model whose matrices are split as they are made, fresh or from a file: trained, saved, read by one process."""
    whole = start(kind)
    config = whole.config
    config.dtype = torch.float64
    name = type(whole).__name__
    cls = getattr(transformers, name, None) or getattr(hf_tying.models, name)
    folder = f"{FOLDER}/{kind}"
    if dist.get_rank() == 0:
        whole.save_pretrained(folder)
    dist.barrier()
    keep = HfDeepSpeedConfig(config_of(3))
    model = cls._from_config(copy.deepcopy(config)) if fresh else cls.from_pretrained(folder, dtype=torch.float64)
    del keep
    found, engine, partitioned = trained(without_dropout(model), 3)
    expected = cls._from_config(copy.deepcopy(config)).double()
    expected.load_state_dict(found.start, strict=False)
    with mock.patch("torch.distributed.is_initialized", return_value=False):
        one = trained_alone(without_dropout(expected))
    result = {**beside(found, one), "partitioned": partitioned}
    if not fresh:
        result["read"] = max((found.start[name] - p).abs().max().item() for name, p in whole.named_parameters())
    state = engine._zero3_consolidated_16bit_state_dict()
    # As Accelerate's guide has it: the other processes have no values, and write nothing.
    model.save_pretrained(f"{folder} trained", is_main_process=dist.get_rank() == 0, state_dict=state)
    if dist.get_rank() == 0:
        saved = cls.from_pretrained(f"{folder} trained", dtype=torch.float64)
        assert_tied(saved)
        result["saved"] = max((found.weights[name] - p).abs().max().item() for name, p in saved.named_parameters())
    dist.barrier()
    return result


#: Each with something that its config makes beside stock modules, or says in another way.
DECLARED = (
    *("bart three_way", "marian three_way", "llama layers", "encoder-decoder three_way", "gpt2 PR", "gpt2 relaxed"),
    *("llama shared layers, relaxed", "llama layers, relaxed"),
)


def partitioned(folder: str, **changes):
    """A model that transformers loads in parts (`zero.Init`), as `TrainingArguments(deepspeed=...)` has it."""
    keep = HfDeepSpeedConfig(config_of(3))  # noqa: F841, as long as it lives
    model = AutoModelForCausalLM.from_pretrained(folder, **changes)
    assert all(p.numel() == 0 for p in model.parameters())
    return model


def values(model, name: str) -> torch.Tensor:
    parameter = find_parameter(model, name)
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def with_another_linear() -> dict:
    """DeepSpeed's own `linear`, its default: what cannot be done is told with its reason and the way out."""
    found = {}
    for kind in ("llama tied loss", "llama AL"):
        settings = config_of(3)
        del settings["zero_optimization"]["memory_efficient_linear"]
        linear = torch.nn.functional.linear
        model = start(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        told.clear()
        try:
            found[kind] = [engine(**inputs(model, own_rows())).logits is None, *told]
        except TyingError as error:
            found[kind] = str(error)
        finally:
            torch.nn.functional.linear = linear
    return found


def written(model, name: str) -> str:
    folder = f"{FOLDER}/{name}"
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return folder


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied_in_parts() -> dict:
    """`tie` and `untie` of a partitioned model, against the same in one process."""
    whole = untied_model("llama")
    folder = written(whole, "untied")
    found = {}
    try:
        tie(partitioned(folder), "two_way")
    except TyingError as error:
        found["without a choice"] = str(error)
    for init_from in ("output", "target", "mean"):
        model = tie(partitioned(folder), "two_way", init_from=init_from)
        expected = tie(untied_model("llama"), "two_way", init_from=init_from)
        assert_tied(model)
        found[init_from] = (values(model, HEAD) - expected.lm_head.weight).abs().max().item()
    untie(model)
    found["untied"] = (values(model, HEAD) - values(model, EMBED)).abs().max().item()
    found["rows"] = list(values(model, HEAD).shape)
    try:
        tie(partitioned(folder), [EMBED, "model.layers.0.mlp.up_proj.weight"], init_from="mean")
    except TyingError as error:
        found["other shapes"] = str(error)
    return found


def files_in_parts() -> dict:
    """Files that hold each name, loaded in parts: equal values are tied, others refused."""
    found = {}
    model = untied_model("llama")
    tie(model, TyingConfig("two_way", groups={"layers": layer_pair(model)}), init_from="mean")
    folder = written(model, "tied")
    loaded = partitioned(folder)
    assert_tied(loaded)
    found["loaded"] = max((values(loaded, name) - p).abs().max().item() for name, p in model.named_parameters())
    found["groups"] = [group.name for group in loaded.tie_groups]
    folder = written(untied_model("llama"), "conflicting")
    try:
        partitioned(folder, tying="two_way")
    except TyingError as error:
        found["conflict"] = str(error)
    return found


def called(name: str, way: str) -> dict:
    """A call of tests/partitioned_calls.py on a partitioned model: how far it is from one on a whole model."""
    kind, call, *_ = (CALLS | REFUSED)[name]
    start = saved_start(kind)
    keep = HfDeepSpeedConfig(config_of(3)) if way == "zero.Init" else None
    model = AutoModelForCausalLM.from_pretrained(start)
    if keep is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(3))
    own, config = [*model.parameters()], model.config.to_dict()
    before = [full(p) for p in own]
    try:
        result = call(model)
    except TyingError as error:
        unchanged = model.config.to_dict() == config and all(map(torch.equal, before, map(full, own)))
        return {"refused": str(error), "unchanged": unchanged}
    del keep  # as long as it lives, all models are partitioned
    expected, of_whole = whole_call(name)
    return {"apart": far(state(model), expected), "result": result, "of a whole one": of_whole}


@cache
def saved_start(kind: str) -> str:
    return written(STARTS[kind](), f"calls {kind}")


@cache
def whole_call(name: str) -> tuple[dict, object]:
    kind, call, *_ = CALLS[name]
    model = AutoModelForCausalLM.from_pretrained(saved_start(kind))
    assert all(p.numel() for p in model.parameters())
    result = call(model)
    return state(model), result


def state(model) -> dict[str, torch.Tensor]:
    return {name: full(p) for name, p in model.named_parameters(remove_duplicate=False)}


def far(a: dict, b: dict) -> float:
    if {name: p.shape for name, p in a.items()} != {name: p.shape for name, p in b.items()}:
        return float("inf")
    return max((a[name] - b[name]).abs().max().item() for name in a)


CASES = {
    **{f"zero.Init, call {name}": partial(called, name, "zero.Init") for name in CALLS | REFUSED},
    **{f"zero3, call {name}": partial(called, name, "zero3") for name in IN_ENGINE},
    "zero.Init, tie": tied_in_parts,
    "zero.Init, files": files_in_parts,
    "another linear": with_another_linear,
    **{f"zero.Init, fresh, {kind}": partial(split_from_the_start, kind, True) for kind in DECLARED},
    **{f"zero.Init, read, {kind}": partial(split_from_the_start, kind, False) for kind in DECLARED},
    **{f"zero{stage}, {kind}": partial(zero, kind, stage) for stage in (2, 3) for kind in KINDS},
}

if __name__ == "__main__":
    run_cases({name: partial(joined, case) for name, case in CASES.items()})
