"""Diseases of adapters: what they do to a tied matrix of the base model, and how they are published."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..report.names import printable
from ..report.on_adapters import SETTINGS, TIED_FORM, WEIGHTS, adapter_header, adapter_settings
from ..report.records import Finding
from .facts import Facts, ModelFacts

_BASE = re.compile(r"^base_model:[ \t]*(?:\n[ \t]*-[ \t]*)?['\"]?([^\s'\"]+)", re.MULTILINE)
# The error of products in the dtype of an adapter.
_TOLERANCE = 1e-2
_LARGEST_ALPHA = 10**9


def one_side(facts: Facts) -> Iterator[Finding]:
    """T012: the adapter changes one name of a matrix that the base model ties, or each by a value of its own."""
    if facts.base is None:
        return
    settings = adapter_settings(facts.source)
    if settings.get("ensure_weight_tying") is True or settings.get("peft_type") == "TIED_LORA":
        return
    base = ModelFacts(facts.base)
    changed = _changed_modules(adapter_header(facts.source))
    for _, names in facts.base.groups:
        used = [name for name in names if name not in base.stock.carriers and name.endswith(".weight")]
        held = [name for name in used if name.removesuffix(".weight") in changed]
        if not held:
            continue
        others = [name for name in used if name not in held]
        what = f"and not {others[0]!r}" if others else f"and {held[-1]!r} by another value"
        yield Finding(
            "T012",
            "error",
            f"the base model ties {' and '.join(map(repr, used))}, and the adapter changes {held[0]!r} {what}: the "
            "adapted model is no longer tied, and a merge gives the change to both sides or loses it.",
            "Train it again with the tied names left out of target_modules and modules_to_save, or with "
            "ensure_weight_tying=True; or untie the base model first.",
        )


def _changed_modules(header: dict[str, Any]) -> set[str]:
    """The modules of the base model that an adapter's file changes."""
    found = set()
    for name in header:
        name = name.removeprefix("base_model.model.")
        path = re.split(
            r"\.(?:lora_|modules_to_save|token_adapter|trainable_tokens_|ia3_|oft_|vera_|original_module)", name
        )
        found.add(path[0] if len(path) > 1 else name.rpartition(".")[0])
    return found


def tied_form_alone(facts: Facts) -> Iterator[Finding]:
    """T015: the tied form in the root, and no export beside it."""
    if adapter_settings(facts.source).get("peft_type") == "TIED_LORA":
        yield Finding(
            "T015",
            "warning",
            "the adapter is in the form of Tied-LoRA, which PEFT alone does not know: on the Hub, in the root of a "
            "repository, only those who have hf_tying can load it.",
            f"hf-tying export {facts.name} OUT; or push it with push_to_hub, which uploads both forms.",
        )


def forms_differ(facts: Facts) -> Iterator[Finding]:
    """T016: the LoRA in the root is not the export of the tied form below."""
    source = facts.source
    folder = source.path()
    if not source.has(f"{TIED_FORM}/{SETTINGS}") or folder is None or not facts.thorough:
        return
    settings = adapter_settings(source)
    if settings.get("peft_type") != "LORA":
        return
    if found := _difference_of_forms(folder, settings):
        yield Finding(
            "T016",
            "error",
            f"the LoRA in the root is not the export of {TIED_FORM}/: {found}. Who has hf_tying and who has not load "
            "two different adapters.",
            f"hf-tying export {facts.name} OUT --subfolder {TIED_FORM}.",
        )


def _difference_of_forms(folder: Path, settings: dict[str, Any]) -> str | None:
    """What differs between both forms of an adapter; `None` where nothing does."""
    import torch
    from safetensors.torch import load_file

    from ..peft.export import lora_config, lora_tensors, read_tied_adapter

    try:
        config, state = read_tied_adapter(folder, TIED_FORM)
        expected = lora_tensors(state, config)
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        return f"the tied form cannot be read ({' '.join(str(error).split()):.200})"
    found = load_file(folder / WEIGHTS)
    odd = sorted(expected.keys() ^ found.keys())
    if odd:
        return f"one of them has no {odd[0]!r}"
    alpha, rank, plain = settings.get("lora_alpha"), settings.get("r"), lora_config(config)
    if not (isinstance(alpha, int | float) and abs(alpha) < _LARGEST_ALPHA and rank):
        return f"{SETTINGS} in the root has lora_alpha {alpha!r:.80} and r {rank!r:.80}"
    scale = alpha / rank / (plain.lora_alpha / plain.r)
    for low in sorted(expected):
        module, _, kind = low.rpartition(".lora_")
        if kind not in ("A.weight", "embedding_A"):
            continue
        high = f"{module}.lora_{kind.replace('A', 'B')}"
        try:
            update = expected[high].double() @ expected[low].double()
            apart = float((update - scale * (found[high].double() @ found[low].double())).abs().max())
        except RuntimeError:
            return f"{low!r} and {high!r} do not have the shapes of the export"
        if not apart <= _TOLERANCE * max(float(update.abs().max()), torch.finfo(torch.float32).eps):
            return f"the update of {module.removeprefix('base_model.model.')!r} differs by {apart:.3g}"
    return None


def base_is_a_path(facts: Facts) -> Iterator[Finding]:
    """T017: the base model is named by a path of the machine that trained it."""
    source = facts.source
    named = {}
    if source.only is None and source.has(SETTINGS):
        named[SETTINGS] = source.json(SETTINGS).get("base_model_name_or_path")
    if source.only is None and source.has("README.md"):
        card = source.read("README.md", 0, min(source.size("README.md"), 2**20)).decode("utf-8", "replace")
        head = card.split("\n---", 1)[0] if card.startswith("---") else ""
        if found := _BASE.search(head):
            named["README.md"] = found[1]
    for file, base in named.items():
        if isinstance(base, str) and base and _is_path(base):
            yield Finding(
                "T017",
                "warning",
                f"{file} names the base model as {printable(base)!r}, a path: nobody else has it, the Hub refuses "
                "such a card, and the path tells of your machine.",
                f"Write the id of the base model into {file}: owner/name.",
            )


def _is_path(base: str) -> bool:
    """Whether the name of a base model is a path and no id on the Hub."""
    if base.startswith(("/", ".", "~")) or "\\" in base or base.count("/") > 1:
        return True
    return bool(re.match(r"[A-Za-z]:", base)) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)
