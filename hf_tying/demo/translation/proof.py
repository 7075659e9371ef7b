"""The claims of the translation demo, each with its evidence."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..models import differing_at_the_start
from ..proof import MOST_DIFFERENCE, Check, in_fresh_process
from . import fresh_process
from .corpus import Corpora
from .training import TranslationRun

#: The largest accepted loss of BLEU of the three_way model against the untied one. In the papers there is none, and
#: another seed changes each score by about half a point. This is claimed only for English to German, for which sizes
#: and learning rate were chosen. From French to Polish, which has more word forms, the loss was 1.8 with the same.
MOST_BLEU_LOST = 1.0
#: The least share of CLDR's validation lines that the three_way model must translate exactly, as a working model does.
LEAST_EXACT_MATCH = 0.5

_ASKED = 64  # sentences that the new processes translate


def start_check(models: dict[str, PreTrainedModel]) -> Check:
    """Check that all models have the same initial values. Call it before training.

    Args:
        models: models by name, the untied one first.
    """
    untied, *tied = models.values()
    differing = sorted({name for model in tied for name in differing_at_the_start(untied, model)})
    return Check(
        "all start from the same weights, the untied matrices apart",
        not differing,
        f"different: {', '.join(differing)}" if differing else "every parameter of the tied models compared",
    )


def outcome_checks(runs: dict[str, TranslationRun], results: dict[str, dict], saved_once: set[str]) -> list[Check]:
    """Check that all models had the same data, and that each tie has fewer parameters and a smaller file.

    Args:
        runs (`dict[str, TranslationRun]`): trained models in the order untied, two_way, three_way.
        results (`dict[str, dict]`): measurements of these models.
        saved_once (`set[str]`): tied models whose file has each matrix once (`save_format="dedup"`). The file of the
            others has every name, because their stock class cannot tie them again, and is not claimed to be smaller.
    """
    tokens = [run.tokens for run in runs.values()]
    digests = [run.data for run in runs.values()]
    parameters = [result["parameters"] for result in results.values()]
    sizes = [results[name]["checkpoint_bytes"] for name in results if name == "untied" or name in saved_once]
    checks = [
        Check(
            "all see the same pairs in the same order",
            len(set(digests)) == len(set(tokens)) == 1,
            f"{tokens[0]:,} tokens each, digests {', '.join(digests)}",
        ),
        Check("each tie leaves fewer parameters", _falls(parameters), " > ".join(f"{n:,}" for n in parameters)),
    ]
    if saved_once:
        names = " and ".join(name for name in results if name in saved_once)
        claim = f"the files of {names} are smaller" if len(saved_once) > 1 else f"the file of {names} is smaller"
        checks.append(Check(claim, _falls(sizes), " > ".join(f"{n:,}" for n in sizes) + " bytes"))
    return checks


def bleu_check(results: dict[str, dict]) -> Check:
    """Check that three-way tying loses at most `MOST_BLEU_LOST` BLEU.

    Args:
        results: measurements of the models.
    """
    untied, three_way = (results[name]["bleu"] for name in ("untied", "three_way"))
    return Check(
        f"three_way's BLEU is at most {MOST_BLEU_LOST} below the untied model's",
        untied - three_way <= MOST_BLEU_LOST,
        f"{three_way:.2f} and {untied:.2f}",
    )


def success_check(run: TranslationRun) -> Check:
    """Check that most validation lines, which only combine learnt parts, are translated exactly.

    Args:
        run: the three_way model.
    """
    return Check(
        f"three_way writes at least {LEAST_EXACT_MATCH:.0%} of the held-out lines letter for letter",
        run.exact_match >= LEAST_EXACT_MATCH,
        f"{run.exact_match:.1%}",
    )


def question_for(corpora: Corpora, num_beams: int, max_length: int) -> dict[str, torch.Tensor]:
    """Make the input of `fresh_process.answer` from the first validation pairs.

    Args:
        corpora: the pairs and the tokenizer.
        num_beams: number of beams.
        max_length: largest number of tokens of a translation.
    """
    rows = corpora.validation_ids[:_ASKED]
    padding = {"input_ids": corpora.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
    numbers = {"num_beams": torch.tensor(num_beams), "max_length": torch.tensor(max_length)}
    return {key: _padded(rows[key], value) for key, value in padding.items()} | numbers


def reload_checks(folders: dict[str, Path], in_memory: dict[str, dict], question: dict) -> list[Check]:
    """Load all folders in two new processes, one without and one with hf_tying, and compare with memory.

    Args:
        folders (`dict[str, Path]`): folders of the saved models by name. The folders have the same names.
        in_memory (`dict[str, dict]`): results of `fresh_process.answer` by the same names, before the models were
            saved.
        question (`dict[str, torch.Tensor]`): input of these results.
    """
    return [
        _reload_check("plain transformers reload all in a fresh process", "plain", folders, in_memory, question),
        _reload_check("hf_tying reloads all in a fresh process, tied", "hf_tying", folders, in_memory, question),
    ]


def _reload_check(claim: str, way: str, folders: dict[str, Path], in_memory: dict[str, dict], question: dict) -> Check:
    found, failure = in_fresh_process(fresh_process.__file__, question, way, *map(str, folders.values()))
    if failure:
        return Check(claim, False, failure)
    differences, beams, counts = [], [], []
    for name, expected in in_memory.items():
        differences.append((found[f"{name}/logits"] - expected["logits"]).abs().max().item())
        beams.append(torch.equal(found[f"{name}/beams"], expected["beams"]))
        counts.append(found[f"{name}/parameters"].item())
    evidence = f"largest difference of a logit {max(differences):.1e}, {len(question['input_ids'])} translations by "
    evidence += f"beam search {'equal' if all(beams) else 'not equal'}"
    holds = max(differences) <= MOST_DIFFERENCE and all(beams)
    if way == "hf_tying":
        holds = holds and counts == [expected["parameters"].item() for expected in in_memory.values()]
        evidence += f", {', '.join(f'{n:,}' for n in counts)} parameters"
    return Check(claim, holds, evidence)


def _falls(numbers: list[int]) -> bool:
    return all(later < earlier for earlier, later in zip(numbers, numbers[1:], strict=False))


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
