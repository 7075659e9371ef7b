"""How others load a saved model: by which class, and what they get without this package."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import TyingConfig
from ..report.checkpoint import read_checkpoint
from ..report.opening import open_source
from ..report.records import TyingReport
from ..report.stock_building import build
from ..report.stock_ties import stock_ties
from ..ties.depth_groups import needs_this_package
from .errors import MissingChoice

#: By the mapping of transformers that has the class: the Auto class, and the task on the Hub. `None`: it has several.
_TASKS = (
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM", None),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM", "text-generation"),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM", "fill-mask"),
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText", "image-text-to-text"),
    ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForSequenceClassification", "text-classification"),
    ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "AutoModelForTokenClassification", "token-classification"),
    ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "AutoModelForQuestionAnswering", "question-answering"),
)
#: The classes of this package that transformers does not know, and their tasks.
_OURS = {
    "TiedLSTMForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "TiedLSTMForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "TiedLSTMForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
}

_AUTO = re.compile(r"AutoModel\w*")

#: What a loader without this package gets. `same`: the model, tied by its class. `copies`: the right values, with
#: copies of what was tied. `merged`: the right values, in fewer matrices, since the class ties equal ones that were
#: apart. `regrouped`: both. `apart`: the right values, of ties with differences. `code`: the model, by the code that
#: comes with it. `other`: another function. `random`: random numbers under names that the file leaves out. `wrong`:
#: another matrix under them. `no file`: an error, since no file has a name that it looks for. `nothing`: an error.
#: `unknown`: it cannot be told without running code.
OUTCOMES = (
    "same", "copies", "merged", "regrouped", "apart", "code", "other", "random", "wrong", "no file", "nothing",
    "unknown",
)  # fmt: skip


@dataclass(frozen=True)
class Loading:
    """How a folder of a model is loaded.

    Args:
        auto_class: Auto class that loads it.
        task: pipeline tag of the Hub; `None` where the class has no one task.
        outcome: what plain transformers gets, one of `OUTCOMES`.
        copies: number of elements that plain transformers holds more, as copies of what is tied.
        merged: number of elements that it holds less, of equal matrices that are apart with this package.
    """

    auto_class: str
    task: str | None
    outcome: str
    copies: int = 0
    merged: int = 0


def how_loaded(folder: Path, config: Mapping[str, Any], report: TyingReport) -> Loading:
    """How others load a saved model.

    Args:
        folder: folder of the model.
        config: content of its `config.json`.
        report: what `tying_report` says of it.

    Returns:
        The class, and what plain transformers gets.
    """
    architecture = architecture_of(config)
    auto_class, task = _task_of(architecture, config)
    entry = TyingConfig.in_config(config)
    if config.get("auto_map"):
        named = config["auto_map"] if isinstance(config["auto_map"], dict) else {}
        ours = next((name for name in named if _AUTO.fullmatch(name)), auto_class)
        return Loading(str(ours), task, "code")
    model = build({key: value for key, value in config.items() if key != "tying"}, architecture)
    if model is None:
        return Loading(auto_class, task, "nothing" if architecture in _OURS else "unknown")
    if needs_this_package(entry):
        return Loading(auto_class, task, "no file")
    checkpoint = read_checkpoint(open_source(folder))
    groups = [[name for name in group.names if name not in group.apart] for group in report.groups]
    found = stock_ties(model, checkpoint, groups, checkpoint.relaxed)
    if entry.projection is not None:
        outcome = "other"
    elif found.random:
        outcome = "random"
    elif found.wrong:
        outcome = "wrong"
    elif entry.relax or any("relax" in stack for stack in entry.depth):
        outcome = "apart"
    elif found.copies and found.merged:
        outcome = "regrouped"
    else:
        outcome = "copies" if found.copies else "merged" if found.merged else "same"
    return Loading(auto_class, task, outcome, found.copies, found.merged)


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that a config names, or the model type where it names none."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return str(first or config.get("model_type") or "unknown")


def refuse_other_function(folder: Path, config: Mapping[str, Any], report: TyingReport) -> None:
    """Refuse a model that computes something else for whoever has not this package.

    Args:
        folder: folder of the model, for the message.
        config: content of its `config.json`.
        report: what `tying_report` says of it.

    Raises:
        MissingChoice: with the ways out.
        TyingError: the config makes no model.
    """
    outcome = how_loaded(folder, config, report).outcome
    if outcome in ("random", "wrong"):
        filled = "fill the others with random numbers" if outcome == "random" else "take other matrices for the rest"
        raise MissingChoice(
            f"Nothing is uploaded: {folder.name} has each tied matrix once (dedup), and its class does not tie them "
            f"by itself: loaders without hf_tying {filled}. Save with "
            'tie(model, TyingConfig(save_format="portable")), or agree to it with yes=True (--yes).'
        )
    if outcome == "other":
        raise MissingChoice(
            f"Nothing is uploaded: {folder.name} has a projection (PR) in a stock class: loaders without hf_tying "
            "leave it out, and give other logits. Fold it into the softmax matrix (merge_projection(model)) and save, "
            "publish a class of your own with its code (register_for_auto_class), or agree to it with yes=True "
            "(--yes)."
        )


def _task_of(architecture: str, config: Mapping[str, Any]) -> tuple[str, str | None]:
    if architecture in _OURS:
        return _OURS[architecture]
    from transformers.models.auto import modeling_auto

    for mapping, auto_class, task in _TASKS:
        names = getattr(modeling_auto, mapping, {}).values()
        if any(architecture in ((name,) if isinstance(name, str) else name) for name in names):
            translates = config.get("model_type") in ("marian", "fsmt")
            return auto_class, "translation" if translates and task is None else task
    return "AutoModel", None
