"""What only a person can tell of a model: kept beside it in `tying_card.json`, so that its card can be made again."""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..config import TyingError
from ..ties.headers import read_json

FACTS = "tying_card.json"


@dataclass(frozen=True)
class Facts:
    """What is told of a model, beside what its files say. Each is left out of the card where nothing is told.

    Args:
        base_model: id of the model that it was trained from.
        license: licence, by its word on the Hub, such as `"apache-2.0"`.
        language: codes of ISO 639.
        datasets: ids of data sets on the Hub.
        description: sentences about the model and its data, after the first one of the card.
        command: the command or the call that made it.
        note: sentences below the results, such as how long the run was.
        features: what it was trained by, for the papers to cite: `"augmented"`, `"contrastive"`.
        results: values by the name of the metric.
        dataset: name of what the results were measured on, and `dataset_id`, its id on the Hub.
        dataset_id: see `dataset`.
        others: results of other models of the same run, by their names; `"untied"` is the untied twin.
    """

    base_model: str | None = None
    license: str | None = None
    language: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    description: str | None = None
    command: str | None = None
    note: str | None = None
    features: list[str] = field(default_factory=list)
    results: dict[str, float] = field(default_factory=dict)
    dataset: str | None = None
    dataset_id: str | None = None
    others: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """What a reader of the card would ask for, and nothing tells."""
        return [name for name in ("license", "language", "datasets") if not getattr(self, name)]


_LISTS = ("language", "datasets", "features")


def facts_of(folder: Path, **told: Any) -> Facts:
    """The facts that were told of a model before, with those that are told now.

    Args:
        folder: folder of the model.
        **told: fields of `Facts`; `None` changes nothing.

    Raises:
        TyingError: there is no such fact, or the file is none of this package.
    """
    known = {each.name for each in fields(Facts)}
    before = read_json(folder / FACTS) if (folder / FACTS).is_file() else {}
    for origin, given in ((f"{FACTS} in {folder}", before), ("make_card", told)):
        if unknown := sorted(given.keys() - known):
            raise TyingError(f"{origin} has {unknown[0]!r}: expected some of {', '.join(sorted(known))}.")
    now = {name: value for name, value in told.items() if value is not None}
    for name in _LISTS:
        if isinstance(now.get(name), str):
            now[name] = [now[name]]
    return replace(Facts(**before), **now)


def keep_facts(folder: Path, facts: Facts) -> None:
    """Write the facts beside the model. Nothing is written where there are none.

    Args:
        folder: folder of the model.
        facts: what was told.
    """
    told = {name: value for name, value in asdict(facts).items() if value not in (None, [], {})}
    if told:
        (folder / FACTS).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
