"""What the card of a Tied-LoRA adapter says: all of it read from the files of its folder, and from what was told."""

import re
from dataclasses import MISSING, fields
from math import prod
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..config import TyingError
from ..peft.adapter_folder import type_of_adapter
from ..peft.config import SWITCHES, TiedLoraConfig, TiedPeftType
from ..peft.export import TIED_FOLDER
from ..peft.sharing import recorded_names
from ..peft.tensor_names import names_in_model
from ..report.names import printable_text
from ..ties.headers import read_header
from .facts import Facts
from .papers import TIED_LORA
from .repository_names import is_repository_id

_AUTO_CLASSES = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
}
#: A name that can stand in code as it is. PEFT makes no other.
_NAME = re.compile(r"[\w.-]+")
#: Settings of an adapter that are no choice of the one who trained it.
_NOT_CHOSEN = (
    *("adapted_modules", "base_model_name_or_path", "auto_mapping", "peft_version", "inference_mode", "revision"),
    *("peft_type", "runtime_config"),
)


def adapter_places(folder: Path) -> dict[str, tuple[Path, Path]]:
    """By its name, where each Tied-LoRA adapter of a folder is: the place that PEFT loads, and that of the tied form.

    Args:
        folder: folder that PEFT has written, with both forms or with the tied one.
    """
    named = [path.parent for path in sorted(folder.glob(f"*/{CONFIG_NAME}")) if path.parent.name != TIED_FOLDER]
    found = {}
    for place in (folder, *named):
        name = "default" if place == folder else place.name
        for tied in (place, place / TIED_FOLDER):
            listed = _NAME.fullmatch(name) and not name.startswith("checkpoint-")
            if listed and type_of_adapter(tied) == TiedPeftType.TIED_LORA:
                found[name] = (place, tied)
    return found


def adapter_context(folder: Path, repo_id: str, facts: Facts) -> dict[str, Any]:
    """The values for the template of an adapter, and its metadata under `metadata`, `tags` and `task`.

    Args:
        folder: folder of one or more Tied-LoRA adapters.
        repo_id: where the adapter is, or will be.
        facts: what was told.

    Raises:
        TyingError: the files cannot be read.
    """
    adapters, factors, forms = [], [], []
    base_model, task = facts.base_model, None
    for name, (place, tied) in adapter_places(folder).items():
        config = _config_at(tied)
        base = config.base_model_name_or_path
        base_model = base_model or (base if is_repository_id(base) else None)
        auto_class, task = _auto_class(config)
        header = read_header(tied / SAFETENSORS_WEIGHTS_NAME)
        subfolder = str(tied.relative_to(folder)) if tied != folder else ""
        at_root = "" if place == folder else place.name
        adapters.append(
            {
                "name": name,
                "ties": ties_of(config),
                "lora_code": _code(auto_class, base_model, repo_id, at_root, False) if place != tied else "",
                "tied_code": _code(auto_class, base_model, repo_id, subfolder, True),
                "calls": " or ".join(
                    f'`PeftModel.from_pretrained(base, "{repo_id}"{_argument(sub)})`'
                    for sub in dict.fromkeys((at_root, subfolder))
                ),
                "settings": _settings(config),
                "modules": len(config.adapted_modules or {}),
                "parameters": sum(prod(shape) for shape, _ in header.values()),
                "lora": _lora_parameters(config),
                "variant": config.variant,
                "r": config.r,
            }
        )
        factors += _factors(config, header)
        for at, form, readers in (
            (place, "LoRA, exported without approximation", "PEFT, transformers, and what reads LoRA"),
            (tied, "Tied-LoRA, for further training", "PEFT with `hf-tying` installed"),
        ):
            if place != tied:
                weights = at / SAFETENSORS_WEIGHTS_NAME
                held = sum(prod(shape) for shape, _ in read_header(weights).values())
                where = str(at.relative_to(folder))
                forms.append({"folder": where, "form": form, "parameters": held, "bytes": weights.stat().st_size,
                              "readers": readers})  # fmt: skip
    if not adapters:
        raise TyingError(f"{folder} has no Tied-LoRA adapter: expected a folder written by save_pretrained.")
    return {
        "summary": _summary(adapters[0], base_model, facts),
        "adapters": adapters,
        "both_forms": bool(forms),
        "forms": forms,
        "factors": factors,
        "papers": [TIED_LORA],
        "tags": ["lora", "tied-lora", *(f"tied-lora:{a['variant']}" for a in adapters if a["variant"])],
        "task": task,
        "library": "peft",
        "base_model": base_model,
        "relation": "adapter",
    }


def ties_of(config: TiedLoraConfig) -> str:
    """The sentence on one adapter: how many factors serve how many modules."""
    modules = [names_in_model(config, module) for module in config.adapted_modules or {}]
    counts = {kind: len({names[kind] for names in modules}) for kind in modules[0]}
    factors = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    name = f"{config.variant}, " if config.variant else ""
    absent = [kind for kind in "uv" if kind not in counts]
    ones = f" ({' = '.join([*absent, '1'])})" if absent else ""
    return f"{name}r = {config.r}; {len(modules)} modules use {factors}{ones}."


def _config_at(place: Path) -> TiedLoraConfig:
    try:
        return cast(TiedLoraConfig, PeftConfig.from_pretrained(str(place)))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise TyingError(f"{place / CONFIG_NAME} cannot be read: {error}") from error


def _auto_class(config: TiedLoraConfig) -> tuple[str, str | None]:
    task = getattr(config.task_type, "value", config.task_type)
    if task in _AUTO_CLASSES:
        return _AUTO_CLASSES[task]
    mapped = (config.auto_mapping or {}).get("base_model_class")
    return (mapped if isinstance(mapped, str) and mapped.isidentifier() else "AutoModel"), None


def _summary(adapter: dict[str, Any], base_model: str | None, facts: Facts) -> str:
    variant = f"{adapter['variant']}, " if adapter["variant"] else ""
    base = f" for [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    fewer = adapter["lora"] / adapter["parameters"]
    sentence = (
        f"A Tied-LoRA adapter ({variant}r = {adapter['r']}){base}: **{adapter['parameters']:,} trained parameters "
        f"serve {adapter['modules']} modules**, where LoRA of that rank has {adapter['lora']:,} ({fewer:.1f} times as "
        "many)."
    )
    return f"{sentence} {facts.description}" if facts.description else sentence


def _lora_parameters(config: TiedLoraConfig) -> int:
    return sum(config.r * (size.in_features + size.out_features) for size in recorded_names(config).values())


def _factors(config: TiedLoraConfig, header: dict[str, tuple[tuple[int, ...], str]]) -> list[dict[str, Any]]:
    rows = []
    modules = [names_in_model(config, module) for module in config.adapted_modules or {}]
    for kind in modules[0]:
        used = [names[kind] for names in modules]
        most = max(used.count(name) for name in used)
        shapes = {shape for key, (shape, _) in header.items() if f".tied_lora_{kind}." in key}
        vectors = {tuple(shape[1:]) for shape in shapes} if kind in "uv" else shapes
        shape = ", ".join(" x ".join(f"{n:,}" for n in each) for each in sorted(vectors))
        shared = f"up to {most} modules each" if most > 1 else "no two modules"
        rows.append({"kind": kind, "count": len(set(used)), "shape": shape, "shared_by": shared})
    return rows


def _settings(config: TiedLoraConfig) -> str:
    """The call that makes the config, with what is not at its default."""
    chosen = []
    for each in fields(config):
        value = getattr(config, each.name, None)
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        given = each.name in _NOT_CHOSEN or (config.variant and each.name in SWITCHES)
        if given or value is None or value == default:
            continue
        value = sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        chosen.append(f"{each.name}={value!r}")
    return printable_text(f"TiedLoraConfig({', '.join(chosen)})").replace("`", "'")


def _argument(subfolder: str) -> str:
    return f', subfolder="{subfolder}"' if subfolder else ""


def _code(auto_class: str, base_model: str | None, repo_id: str, subfolder: str, tied: bool) -> str:
    if not base_model:
        return ""
    first = "import hf_tying  # tells PEFT of Tied-LoRA\n" if tied else ""
    train = ", is_trainable=True" if tied else ""
    return (
        f"{first}from peft import PeftModel\nfrom transformers import {auto_class}\n\n"
        f'base = {auto_class}.from_pretrained("{base_model}")\n'
        f'model = PeftModel.from_pretrained(base, "{repo_id}"{_argument(subfolder)}{train})'
    )
