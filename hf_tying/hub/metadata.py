"""The metadata of a card: what this package knows, put into what is there, and checked before the Hub checks it."""

import re
from collections.abc import Iterable
from typing import Any

from huggingface_hub import ModelCardData

from .repository_names import has_form_of_id, is_repository_id

_WORD = re.compile(r"[\w.+-]+")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z]{2,8})?|multilingual|code")
#: Tags of this package, which are made anew.
_OURS = ("weight-tying", "tying:", "tied-lora")
_ADAPTER_OF = "base_model:adapter:"


def update_metadata(
    data: ModelCardData, facts: dict[str, Any], tags: Iterable[str], adapter_of: str | None = None
) -> None:
    """Put facts into the metadata of a card, in place. What somebody has written there stays, unless it is ours.

    A base model that is a folder of this machine is taken out, wherever another library has written it.

    Args:
        data: metadata of the card.
        facts: values by their keys; `None` is no fact.
        tags: tags of this package and of the user.
        adapter_of: base model of an adapter.
    """
    bases = data.base_model if isinstance(data.base_model, list) else [data.base_model]
    kept_bases = [base for base in bases if base and is_repository_id(base)]
    data.base_model = kept_bases[0] if len(kept_bases) == 1 else kept_bases or None
    old = [tag for tag in _listed(data.tags) if isinstance(tag, str) and not tag.startswith(_OURS)]
    old = [tag for tag in old if not tag.startswith(_ADAPTER_OF) or is_repository_id(tag.removeprefix(_ADAPTER_OF))]
    if adapter_of:
        old = [tag for tag in old if not tag.startswith(_ADAPTER_OF)] + [f"{_ADAPTER_OF}{adapter_of}"]
    data.tags = sorted({*old, *tags}) or None
    for name, value in facts.items():
        if value not in (None, [], ""):
            setattr(data, name, value)


def metadata_problems(data: ModelCardData) -> list[str]:
    """What the Hub would refuse, in words; empty if it would take the metadata.

    Args:
        data: metadata of the card.
    """
    content = data.to_dict()
    problems = [
        f"base_model is {base!r}: expected the id of a repository, owner/name"
        for base in _listed(content.get("base_model"))
        if not has_form_of_id(base)
    ]
    for name in ("license", "library_name", "pipeline_tag"):
        value = content.get(name)
        if value is not None and not (isinstance(value, str) and _WORD.fullmatch(value)):
            problems.append(f"{name} is {value!r}: expected one word")
    for value in _listed(content.get("language")):
        if not (isinstance(value, str) and _LANGUAGE.fullmatch(value)):
            problems.append(f"language is {value!r}: expected a code of ISO 639 such as 'en'")
    problems += [
        f"{name} has {value!r}: expected text"
        for name in ("tags", "datasets", "metrics")
        for value in _listed(content.get(name))
        if not isinstance(value, str)
    ]
    problems += [
        f"datasets has {value!r}: expected the id of a data set, owner/name"
        for value in _listed(content.get("datasets"))
        if isinstance(value, str) and not has_form_of_id(value)
    ]
    return problems


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]
