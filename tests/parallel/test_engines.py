"""f16: several processes reach what one reaches: every engine with every tie and objective of tests/engines.py.

Shared layers and relaxed ties are among them.
"""

import re
from importlib.util import find_spec

import pytest

from ..engines import BY_BLOCKS, COUNTED, DIFFERENT, KINDS
from ..partitioned_calls import CALLS, IN_ENGINE, NEW, NEW_PARAMETERS, REFUSED
from ..processes import run_script

pytestmark = pytest.mark.timeout(400)
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed (DS_BUILD_OPS=0 pip install deepspeed==0.19.8)"
)
WITH_LAYERS_APART = [kind for kind in KINDS if not kind.startswith(("marian", "llama layers", "llama shared layers"))]
#: With the same numbers, but for one rounding of float64, or to float32 where DeepSpeed keeps that.
EXACT, SINGLE = 1e-12, 1e-6


@pytest.fixture(scope="module")
def accelerate() -> dict:
    return run_script("engines_accelerate.py", processes=2, timeout=380)


@pytest.fixture(scope="module")
def four() -> dict:
    cases = [f"{engine}, {kind}" for engine in ("ddp", "fsdp2", "bytes") for kind in FOUR]
    return run_script("engines_accelerate.py", *cases, processes=4, timeout=380)


@pytest.fixture(scope="module")
def deepspeed() -> dict:
    return run_script("engines_deepspeed.py", processes=2, timeout=380)


#: DECLARED of engines_deepspeed.py, which cannot be imported without DeepSpeed.
FROM_CONFIG = (
    *("bart three_way", "marian three_way", "llama layers", "encoder-decoder three_way", "gpt2 PR", "gpt2 relaxed"),
    *("llama shared layers, relaxed", "llama layers, relaxed"),
)
FOUR = ("bart three_way", "llama layers", "llama tied loss", "bert CWT", "gpt2 PR")


def is_as_alone(found: dict, kind: str, bound: float) -> None:
    assert found["gradient"] < bound and found["weights"] < bound and found["moved"] > 1e-4
    assert found["names"] == found["without gradient"] == []
    assert found["without logits"] == (kind in BY_BLOCKS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_accelerate_trains_as_one_process_does(accelerate, engine, kind):
    is_as_alone(accelerate[f"{engine}, {kind}"], kind, EXACT)


@pytest.mark.parametrize("kind", FOUR)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_four_processes_train_as_one_does(four, engine, kind):
    is_as_alone(four[f"{engine}, {kind}"], kind, EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp2_really_has_sharded(accelerate, kind):
    found = accelerate[f"fsdp2, {kind}"]
    assert found["sharded"]
    assert found["units"] > 2 or kind not in WITH_LAYERS_APART


@pytest.mark.parametrize("kind", DIFFERENT)
def test_one_process_reads_what_fsdp2_has_trained_and_each_loader_the_same_values(accelerate, kind):
    assert accelerate[f"fsdp2, {kind}"]["reloaded"] == 0.0


@pytest.mark.parametrize("kind", DIFFERENT)
def test_who_asks_for_a_sharded_relaxed_parameter_starts_no_collective(accelerate, kind):
    asked = accelerate[f"fsdp2, {kind}"]["asked"]
    assert asked and all(asked)


@pytest.mark.parametrize("kind", COUNTED)
def test_a_plan_has_the_bytes_that_ddp_and_fsdp2_send(accelerate, kind):
    found = accelerate[f"bytes, {kind}"]
    assert found["counted"] == found["planned"] and min(found["counted"].values()) > 0


@pytest.mark.parametrize("kind", FOUR)
def test_a_plan_has_the_bytes_of_four_processes(four, kind):
    assert four[f"bytes, {kind}"]["counted"] == four[f"bytes, {kind}"]["planned"]


@pytest.mark.parametrize(
    "case",
    [
        *("checkpointed, llama two_way", "checkpointed, llama layers", "checkpointed, bart tied loss"),
        *("checkpointed, llama tied loss", "from meta, llama two_way", "from meta, llama layers"),
        *("from meta, t5 three_way", "from meta, bert two_way", "from meta, encoder-decoder three_way"),
        *("from meta, llama CWT", "compiled, llama two_way", "compiled, llama tied loss"),
        *("checkpointed, llama shared layers, relaxed", "from meta, llama layers, relaxed"),
    ],
)
def test_fsdp2_with_checkpointing_loaded_on_the_meta_device_or_compiled(accelerate, case):
    found = accelerate[f"fsdp2 {case}"]
    assert found["sharded"]
    is_as_alone(found, case.partition(", ")[2], EXACT)


def test_fsdp2_keeps_the_ties_of_a_model_that_is_a_part_of_another_module(accelerate):
    found = accelerate["fsdp2 held, llama layers"]
    assert found["sharded"] and found["gradient"] < EXACT and found["without gradient"] == []


@pytest.mark.parametrize("control", ["halved", "not reduced", "not gathered"])
def test_the_comparison_sees_a_wrong_gradient(accelerate, control):
    assert accelerate[f"control, {control}"]["gradient"] > 1e-2


@needs_deepspeed
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_one_process_does(deepspeed, stage, kind):
    found = deepspeed[f"zero{stage}, {kind}"]
    assert found["partitioned"] == (stage == 3)
    is_as_alone(found, kind, SINGLE)


@needs_deepspeed
@pytest.mark.parametrize("kind", FROM_CONFIG)
@pytest.mark.parametrize("way", ["fresh", "read"])
def test_a_model_that_deepspeed_splits_as_it_is_made_trains_and_saves_as_one_process_does(deepspeed, way, kind):
    found = deepspeed[f"zero.Init, {way}, {kind}"]
    is_as_alone(found, kind, SINGLE)
    assert found["partitioned"] or kind == "llama shared layers, relaxed"  # its factors, of one number, stay whole
    assert found["saved"] == 0.0 and found.get("read", 0.0) < SINGLE


@needs_deepspeed
def test_a_partitioned_model_is_tied_by_its_values_and_not_by_empty_shards(deepspeed):
    found = deepspeed["zero.Init, tie"]
    assert re.search("hold different values .*1024 of 1024 elements differ", found["without a choice"])
    assert found["output"] == found["target"] == found["mean"] == found["untied"] == 0.0
    assert found["rows"] == [64, 16]
    assert re.search(r"is \(64, 16\) .* is \(32, 16\)", found["other shapes"])


@needs_deepspeed
def test_a_file_that_is_loaded_in_parts_is_tied_or_refused_as_in_one_process(deepspeed):
    found = deepspeed["zero.Init, files"]
    assert found["loaded"] == 0.0 and found["groups"] == ["embeddings", "layers"]
    assert "different values for names that the config ties" in found["conflict"]


@needs_deepspeed
def test_what_deepspeeds_own_linear_takes_away_is_told_with_the_way_out(deepspeed):
    found = deepspeed["another linear"]
    logits_are_none, told = found["llama tied loss"]
    assert not logits_are_none and '"memory_efficient_linear": false' in told
    assert '"memory_efficient_linear": false' in found["llama AL"]


@needs_deepspeed
@pytest.mark.parametrize(
    "case",
    [f"zero.Init, call {name}" for name in CALLS]
    + [f"zero3, call {name}" for name in IN_ENGINE if name in CALLS and name not in NEW_PARAMETERS],
)
def test_a_call_on_a_partitioned_model_gives_what_it_gives_on_a_whole_one(deepspeed, case):
    found = deepspeed[case]
    assert found["apart"] < SINGLE
    assert found["result"] == like(found["of a whole one"])


@needs_deepspeed
@pytest.mark.parametrize(
    ("case", "sentence"),
    [(f"zero.Init, call {name}", sentence) for name, (_, _, sentence) in REFUSED.items()]
    + [(f"zero3, call {name}", NEW) for name in NEW_PARAMETERS],
)
def test_what_a_partitioned_model_cannot_do_is_refused_before_anything_is_changed(deepspeed, case, sentence):
    found = deepspeed[case]
    assert re.search(sentence, found["refused"]) and found["unchanged"]


def like(value):
    """`value`, with each number to its rounding."""
    if isinstance(value, dict):
        return {key: like(each) for key, each in value.items()}
    if isinstance(value, list):
        return [like(each) for each in value]
    return pytest.approx(value, rel=1e-5, abs=SINGLE) if isinstance(value, float) else value
