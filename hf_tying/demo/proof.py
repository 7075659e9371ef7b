"""What the demo claims, each claim with the evidence it rests on."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..config import TyingError
from ..ties.verify import assert_tied
from . import fresh_process

#: The tied model may be this much worse at most. The papers promise that it is better.
MOST_PERPLEXITY_RATIO = 1.02
# Same weights, code, threads and batches: what may differ is how memory is aligned, some units in the last place.
MOST_DIFFERENCE = 1e-4
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Check:
    """A claim, whether it holds, and the numbers that say so."""

    claim: str
    holds: bool
    evidence: str


def reload_checks(folder: Path, in_memory: dict[str, torch.Tensor], blocks: torch.Tensor) -> list[Check]:
    """Load `folder` in two fresh processes, one without and one with hf_tying, and compare with the model in memory.

    Args:
        folder (`Path`): a saved model with its tokenizer.
        in_memory (`dict[str, torch.Tensor]`): what `fresh_process.score` gave for the model before it was saved.
        blocks (`torch.Tensor`): the validation blocks it was scored on.

    Returns:
        `list[Check]`: one for each way to load.
    """
    return [
        _reload_check("plain transformers reload it in a fresh process", folder, in_memory, blocks),
        _reload_check("hf_tying reloads it in a fresh process, tied", folder, in_memory, blocks, "hf_tying"),
    ]


def _reload_check(claim: str, folder: Path, expected: dict, blocks: torch.Tensor, *plugin: str) -> Check:
    found, failure = in_fresh_process(fresh_process.__file__, {"blocks": blocks}, str(folder), *plugin)
    if failure:
        return Check(claim, False, failure)
    difference = (found["logits"] - expected["logits"]).abs().max().item()
    holds = difference <= MOST_DIFFERENCE and abs(found["loss"] - expected["loss"]).item() <= MOST_DIFFERENCE
    evidence = f"validation loss {found['loss']:.6f}, largest difference of a logit {difference:.1e}"
    if plugin:
        holds = holds and found["parameters"].item() == expected["parameters"].item()
        evidence += f", {found['parameters']:,} parameters"
    return Check(claim, holds, evidence)


def in_fresh_process(
    script: str, question: dict[str, torch.Tensor], *arguments: str
) -> tuple[dict[str, torch.Tensor], str]:
    """Run `script QUESTION ANSWER arguments...`, two safetensors files first, in a Python of its own.

    Args:
        script (`str`): a file, run by path, so that the package is imported only if the script imports it.
        question (`dict[str, torch.Tensor]`): what the script reads from the first file.
        *arguments (`str`): further arguments.

    Returns:
        `tuple[dict[str, torch.Tensor] | None, str]`: what the script wrote to the second file; or `None` and how the
        process failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        files = [str(Path(scratch, f"{name}.safetensors")) for name in ("question", "answer")]
        save_file(question, files[0])
        # The copy of hf_tying that runs here is the one to prove, installed or not.
        path = os.pathsep.join(filter(None, (str(_PACKAGE.parent), os.environ.get("PYTHONPATH"))))
        threads = str(torch.get_num_threads())  # sums are rounded in another order with another number
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-P", script, *files, *arguments]
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        if process.returncode:
            last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
            return None, f"the process ended with {process.returncode}: {last_line}"
        return load_file(files[1]), ""


def still_tied(claim: str, *models: PreTrainedModel) -> Check:
    """`assert_tied` on each model."""
    try:
        for model in models:
            assert_tied(model)
    except TyingError as error:
        return Check(claim, False, str(error))
    return Check(claim, True, "declared, actual and config agree")
