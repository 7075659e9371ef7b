"""Two processes go on with the run of one, and one with theirs, under DDP and FSDP2, in each form of its files."""

import os
from pathlib import Path

import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_tying import assert_tied

from ..engines import KINDS
from ..processes import run_script

ALL = bool(os.environ.get("ZOO"))
pytestmark = pytest.mark.timeout(1500 if ALL else 300)
#: The control is without a callback, and as transformers ties it.
TRAINED = (*KINDS, "stock gpt2") if ALL else ("bart three_way", "llama shared layers, relaxed")
#: How many processes make two steps each.
STAGES = (1, 2, 1) if ALL else (1, 2)
#: The engine of each stage: DDP, or FSDP2 with files whole or in shards, which change their form or keep it.
WAYS = {
    "ddp": ("ddp",) * 3,
    "whole, then in shards": ("full", "sharded", "full"),
    "in shards, then whole": ("sharded", "full", "sharded"),
}
if ALL:
    WAYS |= {"whole": ("full",) * 3, "in shards": ("sharded",) * 3}
EXACT = 1e-11


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder of all runs, and what the scripts of each stage told."""
    folder = tmp_path_factory.mktemp("runs")
    stages = [[] for _ in STAGES]
    for kind in TRAINED:
        stages[0].append(f"ddp > {kind} > {2 * len(STAGES)} > undisturbed")
        for way, engines in WAYS.items():
            for stage, engine in enumerate(engines[: len(STAGES)]):
                case = f"{engine} > {kind} > {2 * stage + 2} > {way} {stage}"
                stages[stage].append(case + (f" > {way} {stage - 1}/checkpoint-{2 * stage}" if stage else ""))
    told = []
    for number, (cases, processes) in enumerate(zip(stages, STAGES, strict=True)):
        group = {"RUNS": str(folder)}
        if processes == 1:  # FSDP needs a group of one
            group |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            group |= {"MASTER_ADDR": "127.0.0.1", "RENDEZVOUS": f"file://{folder}/rendezvous {number}"}
        told.append(run_script("resumed.py", *cases, processes=processes, timeout=1200, variables=group))
    return folder, told


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("way", WAYS)
def test_another_number_of_processes_goes_on_as_one_that_was_not_disturbed(runs, way, kind):
    losses, weights = torch.load(runs[0] / kind / "undisturbed.pt")
    found, trained = torch.load(runs[0] / kind / f"{way} {len(STAGES) - 1}.pt")
    assert len(found) == 2 * len(STAGES) and found == pytest.approx(losses, rel=1e-6)  # which Trainer logs in float32
    assert trained.keys() == weights.keys()
    assert max((trained[name] - weights[name]).abs().max().item() for name in weights) < EXACT


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("way", WAYS)
def test_the_engine_was_the_one_asked_for_and_writes_in_the_form_of_its_config(runs, way, kind):
    for stage, engine in enumerate(WAYS[way][: len(STAGES)]):
        [found] = [found for case, found in runs[1][stage].items() if f"> {kind} > " in case and f"> {way} " in case]
        assert found == {"wrapped": True, "form": None if engine == "ddp" else f"{engine.upper()}_STATE_DICT"}
        files = {path.name for path in (runs[0] / kind / f"{way} {stage}" / f"checkpoint-{2 * stage + 2}").iterdir()}
        assert ("pytorch_model_fsdp_0" in files) == (engine == "sharded")
        assert ("pytorch_model_fsdp.bin" in files) == (engine == "full")


@pytest.mark.parametrize("kind", [kind for kind in TRAINED if "LoRA" not in kind])
@pytest.mark.parametrize("merged", [False, True], ids=["at the end", "merged by Accelerate"])
def test_what_two_processes_have_written_in_shards_is_read_by_one(runs, merged, kind):
    folder = runs[0] / kind / "whole, then in shards 1"
    if merged:  # with the config that the callback writes beside the shards
        if kind.startswith("stock"):
            pytest.skip("stock writes no config beside its shards")
        folder /= "checkpoint-4"
        merge_fsdp_weights(str(folder / "pytorch_model_fsdp_0"), str(folder))
    reads = AutoModelForCausalLM
    if kind.startswith(("bart", "t5", "marian", "encoder")):
        reads = AutoModelForSeq2SeqLM
    model = reads.from_pretrained(folder)
    assert_tied(model)
    _, weights = torch.load(runs[0] / kind / "whole, then in shards 1.pt")
    assert all(p.equal(weights[name]) for name, p in model.named_parameters())
