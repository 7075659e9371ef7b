"""The claims of the demo, each with its evidence."""

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

#: The largest accepted ratio of the tied model's perplexity to the untied one's. In the papers it is below 1.
MOST_PERPLEXITY_RATIO = 1.02
# Weights, code, threads and batches are the same. Only the alignment of memory may differ, which changes last digits.
MOST_DIFFERENCE = 1e-4
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Check:
    """A claim of the demo.

    Args:
        claim: the claim in words.
        holds: whether it is true.
        evidence: the numbers that show it.
    """

    claim: str
    holds: bool
    evidence: str


def reload_checks(folder: Path, in_memory: dict[str, torch.Tensor], blocks: torch.Tensor) -> list[Check]:
    """Load `folder` in two new processes, one without and one with hf_tying, and compare with the model in memory.

    Args:
        folder (`Path`): folder of a saved model with its tokenizer.
        in_memory (`dict[str, torch.Tensor]`): result of `fresh_process.score` for the model before it was saved.
        blocks (`torch.Tensor`): validation blocks of that result, (blocks, length), int64.

    Returns:
        `list[Check]`: one check for each process.
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
) -> tuple[dict[str, torch.Tensor] | None, str]:
    """Run `script QUESTION ANSWER arguments...` in a new Python process. The first two are safetensors files.

    Args:
        script (`str`): file that is run by its path, so that the package is imported only if the script imports it.
        question (`dict[str, torch.Tensor]`): content of the first file, which the script reads.
        *arguments (`str`): further arguments of the script.

    Returns:
        `tuple[dict[str, torch.Tensor] | None, str]`: content of the second file, which the script wrote, and `""`; or
        `None`, and the failure of the process in words.
    """
    with tempfile.TemporaryDirectory() as scratch:
        files = [str(Path(scratch, f"{name}.safetensors")) for name in ("question", "answer")]
        save_file(question, files[0])
        # The process imports the same copy of hf_tying as this one, installed or not.
        path = os.pathsep.join(filter(None, (str(_PACKAGE.parent), os.environ.get("PYTHONPATH"))))
        threads = str(torch.get_num_threads())  # the number of threads changes the rounding of sums
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-P", script, *files, *arguments]
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        if process.returncode:
            last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
            return None, f"the process ended with {process.returncode}: {last_line}"
        return load_file(files[1]), ""


def still_tied(claim: str, *models: PreTrainedModel) -> Check:
    """Check models by `assert_tied`.

    Args:
        claim: the claim in words.
        *models: models that should be tied.
    """
    try:
        for model in models:
            assert_tied(model)
    except TyingError as error:
        return Check(claim, False, str(error))
    return Check(claim, True, "declared, actual and config agree")
