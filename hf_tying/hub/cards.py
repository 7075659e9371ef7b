"""`make_card`: the card of a saved model or adapter, from its files. Made again, it keeps what was written by hand."""

import re
from importlib import resources
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..config import TyingError
from .errors import UnfitError
from .facts import Facts, facts_of, keep_facts
from .metadata import metadata_problems, update_metadata
from .repository_names import has_form_of_id
from .results import Results, read_results
from .sections import merge_sections
from .words import change, megabytes, number, percent, plain

CARD = "README.md"
_CONFIG = "config.json"


def make_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    tags: list[str] | None = None,
    save: bool = True,
    **facts: Any,
) -> ModelCard:
    """Make the card of a saved model or Tied-LoRA adapter, or renew the one that is there.

    Every number comes from the files: `config.json`, the safetensors headers, and what `Trainer` has left
    (`all_results.json`, `trainer_state.json`). A section without facts is left out. The sections of this package stand
    between markers, `<!-- hf_tying:ties --> ... <!-- /hf_tying:ties -->`; what is outside of them is kept, but for the
    placeholders of templates. What is told here is kept in `tying_card.json`, so that `make_card(folder)` makes the
    same card again. No weights are loaded, and no code of the folder is run.

    Args:
        folder: folder of a model with `config.json` and safetensors files, or of a Tied-LoRA adapter.
        repo_id: repository that the card names. Default: the name of the folder.
        tags: more tags.
        save: whether to write `README.md` and `tying_card.json` into the folder. Default `True`.
        **facts: what the files do not say: `base_model`, `license`, `language`, `datasets`, `description`, `command`,
            `note`, `results` (values by metric), `dataset` and `dataset_id` (what they were measured on), `others`
            (results of other models by name; `"untied"` is the untied twin), `features` (`"augmented"`,
            `"contrastive"`).

    Returns:
        The card.

    Raises:
        UnfitError: the Hub would refuse the metadata.
        TyingError: the files cannot be read, or a fact is unknown.
    """
    folder = refuse_strange(folder)
    told = facts_of(folder, **facts)
    found = read_results(folder)
    name = repo_id or re.sub(r"[^\w.-]+", "-", folder.resolve().name).strip("-.") or "model"
    if not has_form_of_id(name):
        raise TyingError(f"{name!r} is no name of a repository: expected owner/name.")
    context, template = _context(folder, name, told, found)
    rows = _rows(told, found)
    context |= {
        "repo_id": name,
        "results": rows,
        "has_twin": "untied" in told.others,
        "others": list(told.others),
        "note": told.note,
        "command": told.command,
        "log": found.log,
        "steps": found.steps,
    }
    path = folder / CARD
    card = ModelCard(path.read_text(encoding="utf-8") if path.is_file() else "---\n{}\n---\n")
    card.text = "\n" + merge_sections(card.text, _render(template, context), name.rpartition("/")[2])
    data = cast(ModelCardData, card.data)
    _fill_metadata(data, context, told, rows, name, tags or [])
    if problems := metadata_problems(data):
        raise UnfitError(f"The Hub would refuse the card of {name}: {'; '.join(problems)}.")
    if save:
        keep_facts(folder, told)
        card.save(path)
    return card


def _context(folder: Path, repo_id: str, told: Facts, found: Results) -> tuple[dict[str, Any], str]:
    if (folder / _CONFIG).is_file():
        from .model_card import model_context

        return model_context(folder, repo_id, told, found), "tied_model.md"
    from .adapter_card import adapter_context

    return adapter_context(folder, repo_id, told), "tied_lora.md"


def refuse_strange(place: str | Path) -> Path:
    """The folder of a model or an adapter that a user has named; an empty name is not the folder of the process.

    Raises:
        TyingError: there is no such folder, or it has no `config.json`, and no `adapter_config.json` anywhere.
    """
    folder = Path(place)
    if place == "" or not folder.is_dir():
        raise TyingError(f"{str(place)!r:.300} is no folder: expected a folder of save_pretrained.")
    if not (folder / _CONFIG).is_file() and not any(folder.glob("**/adapter_config.json")):
        raise TyingError(
            f"{folder} has no {_CONFIG} and no adapter_config.json: expected a folder of save_pretrained."
        )
    return folder


def _rows(told: Facts, found: Results) -> list[dict[str, Any]]:
    """A row for each metric: what was told, before what the run has left."""
    metrics = found.metrics | told.results
    dataset = plain(told.dataset or told.dataset_id or "the validation data of the run")
    return [
        {
            "name": name,
            "value": value,
            "untied": told.others.get("untied", {}).get(name),
            "others": [other.get(name) for other in told.others.values()],
            "dataset": dataset,
        }
        for name, value in metrics.items()
    ]


def _render(template: str, context: dict[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    text = resources.files("hf_tying.hub").joinpath("templates", template).read_text(encoding="utf-8")
    helpers = {"plain": plain, "number": number, "size": megabytes, "percent": percent, "change": change}
    made = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True).from_string(text)
    return made.render(**context, **helpers)


def _fill_metadata(
    data: ModelCardData, context: dict[str, Any], told: Facts, rows: list[dict], name: str, tags: list[str]
) -> None:
    facts: dict[str, Any] = {
        "library_name": context["library"],
        "pipeline_tag": data.pipeline_tag or context["task"],
        "base_model": context["base_model"],
        "base_model_relation": context["relation"] if context["base_model"] else None,
        "license": told.license,
        "language": told.language,
        "datasets": told.datasets or ([told.dataset_id] if told.dataset_id else []),
        "metrics": [row["name"] for row in rows if row["name"] != "loss"],
    }
    if rows and told.dataset_id:
        facts["model_name"] = name.rpartition("/")[2]
        facts["eval_results"] = [
            EvalResult(
                task_type=facts["pipeline_tag"] or "other",
                dataset_type=told.dataset_id,
                dataset_name=told.dataset or told.dataset_id,
                metric_type=row["name"],
                metric_value=row["value"],
            )
            for row in rows
        ]
    update_metadata(
        data, facts, [*context["tags"], *tags], context["base_model"] if context["library"] == "peft" else None
    )
