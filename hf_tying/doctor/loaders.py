"""What each loader will do with the softmax matrix of a file: one dated table of rules, and the forecast from it.

The rows of transformers and mlx are checked by loading (tests/doctor and tests/upstream). The others were read in
their sources.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..config import TyingError
from ..report.checkpoint import Checkpoint
from ..report.stock_table import FLAG, part_of
from ..ties.depth_groups import SUFFIX, needs_this_package
from .facts import Facts, ModelFacts
from .flags import rows_and_vocabulary

#: The day on which the sources were read.
DATE = "2026-11-29"
#: What can happen to the softmax: it is the embedding; a matrix of its own; an equal copy; random; the file's own head
#: is thrown away; the loader refuses the file; nothing can be said.
OUTCOMES = ("tie", "untie", "duplicate", "random head", "head dropped", "refuse", "unknown")


class Head(NamedTuple):
    """What a file says of its softmax matrix.

    Args:
        tied: whether the class ties it under the flags as transformers reads them.
        one: whether it and the embedding are one parameter once transformers has tied what the file lets it tie.
        lost: whether transformers finds no values for one of them.
        flag: `tie_word_embeddings` as it stands in the file (of the text part, where that has it); `None`: absent.
        embedding: whether the file has the embedding.
        head: whether it has the softmax matrix, under its own name.
        equal: whether both have the same values.
        sizes_fit: whether the rows are those that the config states.
        strange: tensors that the class has no place for, such as a projection.
        config: `config.json`.
    """

    tied: bool
    one: bool
    lost: bool
    flag: bool | None
    embedding: bool
    head: bool
    equal: bool
    sizes_fit: bool
    strange: list[str]
    config: dict[str, Any]


class Loader(NamedTuple):
    """A row of the table.

    Args:
        rule: what is done, in one sentence.
        version: the versions or the commit that it was read or run in.
        source: file in which it stands.
        checked: `"run"` if a test loads files with it, `"read"` if its source was read.
        outcome: the rule.
    """

    rule: str
    version: str
    source: str
    checked: str
    outcome: Callable[[Head], str]


@dataclass(frozen=True)
class Forecast:
    """What one loader will do with a file.

    Args:
        loader: its name.
        outcome: one of `OUTCOMES`.
        rule: the rule that says so.
        version: versions for which it holds.
        source: where the rule was found.
        checked: `"run"` or `"read"`.
        date: day on which it was checked.
    """

    loader: str
    outcome: str
    rule: str
    version: str
    source: str
    checked: str
    date: str = DATE

    def to_dict(self) -> dict[str, str]:
        """Plain types, ready for JSON."""
        return asdict(self)


def _transformers(head: Head) -> str:
    if not head.sizes_fit:
        return "refuse"
    if head.lost:
        return "random head"
    if head.one:
        return "tie"
    return "duplicate" if head.equal else "untie"


def _by_flag(head: Head, missing: str) -> str:
    if not head.sizes_fit or not head.embedding:
        return "refuse"
    if head.tied if head.flag is None else head.flag:
        return "head dropped" if head.head and not head.equal else "tie"
    if not head.head:
        return missing
    return "duplicate" if head.equal else "untie"


def _vllm(head: Head) -> str:
    outcome = _by_flag(head, "refuse")
    skipped = "lm_head." if outcome in ("tie", "head dropped") else ()
    return outcome if all(name.startswith(skipped) for name in head.strange) else "refuse"


def _llama_cpp(head: Head) -> str:
    if not head.embedding or not head.sizes_fit or head.strange:
        return "refuse"
    if not head.head:
        return "tie"
    return "duplicate" if head.equal else "untie"


def _mlx(head: Head) -> str:
    kind, known = head.config.get("model_type"), mlx_models()
    row = known["models"].get(known["renamed"].get(kind, kind)) if isinstance(kind, str) else None
    if row is None or not head.sizes_fit or not head.embedding or head.strange:
        return "refuse"
    if any(name not in head.config for name in row["needs"]):
        return "refuse"
    tied = {"always": True, "never": False, "by file": not head.head}.get(row["ties"])
    if tied is None:
        if row["ties"] == "unknown":
            return "unknown"
        tied = row["ties"] == "true" if head.flag is None else head.flag
    if tied and head.head and not row["drops"]:
        return "refuse"
    if tied:
        return "tie" if head.equal or not head.head else "head dropped"
    return "refuse" if not head.head else "duplicate" if head.equal else "untie"


@cache
def mlx_models() -> dict[str, Any]:
    """What mlx-lm does by `model_type`: a table from its classes, made by `python -m tests.upstream.loaders --table`.

    `"models"` has for each type `ties` (`"true"`, `"false"`: the flag, and its default; `"always"`, `"never"`,
    `"by file"`: tied where the file has no head; `"unknown"`), `drops` (whether a head that is not wanted is passed
    over, or an error) and `needs` (fields of the config without which it is not made).
    """
    return json.loads(Path(__file__).with_name("mlx_models.json").read_text(encoding="utf-8"))


LOADERS: dict[str, Loader] = {
    "transformers": Loader(
        "Ties what the class declares under its flag; where the file has both and they differ, it leaves them untied; "
        "what is missing and not tied is random.",
        "5.17.0 to 5.24.0",
        "transformers/modeling_utils.py, tie_weights",
        "run",
        _transformers,
    ),
    "vllm": Loader(
        "Ties by the flag alone, and skips the file's lm_head then; without the flag, a missing head is an error; so "
        "is a tensor without a place.",
        "00b5ad0",
        "vllm/model_executor/models/llama.py, model_loader/default_loader.py",
        "read",
        _vllm,
    ),
    "sglang": Loader(
        "Ties by the flag alone, and skips the file's lm_head then; without the flag, a missing head stays as it was "
        "allocated.",
        "0023954",
        "python/sglang/srt/models/llama.py, load_weights",
        "read",
        lambda head: _by_flag(head, "random head"),
    ),
    "llama.cpp": Loader(
        "Reads no flag: a GGUF file without output.weight has token_embd.weight for its softmax. A tensor that "
        "convert_hf_to_gguf.py has no name for is an error.",
        "master of 2026-11",
        "src/models/*.cpp, load_arch_tensors",
        "read",
        _llama_cpp,
    ),
    "mlx": Loader(
        "Ties by the flag, whose default is its own for each model type, and drops the file's lm_head then, or "
        "refuses it; some types are always tied, or never. A missing head, a tensor without a place, a field of the "
        "config that its class has no default for and a model type that it does not have are errors.",
        "mlx-lm 0.32.2",
        "mlx_lm/models/*.py, ModelArgs and sanitize; mlx_lm/utils.py, load_model",
        "run",
        _mlx,
    ),
    "onnx": Loader(
        "optimum exports the model that transformers loads, and writes what is one parameter once.",
        "master of 2026-11",
        "optimum/onnx/graph_transformations.py, remove_duplicate_weights_from_tied_info",
        "read",
        _transformers,
    ),
}


def head_of(checkpoint: Checkpoint) -> Head | None:
    """What a file says of its softmax matrix; `None` of a model without one, or of an unknown class.

    Raises:
        TyingError: the config does not make its class.
    """
    if checkpoint.form == "gguf":
        embedding, head = "token_embd.weight", "output.weight"
        held = [name in checkpoint.tensors for name in (embedding, head)]
        equal = all(held) and checkpoint.values.equal([embedding], [head])
        return Head(False, False, False, None, held[0], held[1], equal, True, [], {})
    model = ModelFacts(checkpoint)
    if (pair := model.pair()) is None:
        return None
    # The name whose values each of them has, once transformers has tied what it can.
    places = [_root(model, name) or name for name in pair]
    keys = [checkpoint.keys_of(place) or _other_keys(model, name) for place, name in zip(places, pair, strict=True)]
    one, lost = places[0] == places[1], not all(keys)
    equal = not lost and (one or checkpoint.values.equal(*keys))
    own = checkpoint.keys_of(pair[1])
    if one and own and keys[0] and own != keys[0]:
        equal = checkpoint.values.equal(keys[0], own)
    return Head(
        tied=any(set(pair) <= set(chain) for chain in model.declared),
        one=one,
        lost=lost,
        flag=_flag(checkpoint.config),
        embedding=bool(checkpoint.keys_of(pair[0]) or checkpoint.keys_of(places[0])),
        head=bool(own),
        equal=equal,
        sizes_fit=not list(rows_and_vocabulary(Facts(checkpoint.source), model)),
        strange=_strange(model),
        config=checkpoint.config,
    )


def _root(model: ModelFacts, name: str) -> str | None:
    """The root to which transformers ties `name`: where the file has both, only if they are equal; else `None`."""
    chain = next((chain for chain in model.declared if name in chain), None)
    if chain is None:
        return None
    root, own = (model.checkpoint.keys_of(each) for each in (chain[0], name))
    return chain[0] if not root or not own or model.checkpoint.values.equal(root, own) else None


def _other_keys(model: ModelFacts, name: str) -> list[str]:
    """The tensors of another name of a chain, where the file lacks its root."""
    chain = next((chain for chain in model.declared if name in chain), [name])
    return next((keys for other in chain if (keys := model.checkpoint.keys_of(other))), [])


def _strange(model: ModelFacts) -> list[str]:
    """The tensors that the class has no place for, by the parts that its files have."""
    parts = {*model.stock.parts}
    return [n for n in model.checkpoint.tensors if parts and (part_of(n) not in parts or f"{SUFFIX}." in n)]


def _flag(config: dict[str, Any]) -> bool | None:
    for part in (config.get("text_config"), config.get("decoder"), config):
        if isinstance(part, dict) and isinstance(part.get(FLAG), bool):
            return part[FLAG]
    return None


def forecast(checkpoint: Checkpoint, loaders: Iterable[str] = ()) -> list[Forecast]:
    """Say what loaders will do with the softmax matrix of a file.

    Args:
        checkpoint: the file, as `read_checkpoint` gives it.
        loaders: names in `LOADERS`. Default: all of them.

    Raises:
        TyingError: an unknown loader, or a config that does not make its class.
    """
    names = [*loaders] or [*LOADERS]
    if unknown := [name for name in names if name not in LOADERS]:
        raise TyingError(f"Unknown loader {unknown[0]!r:.80}: expected some of {', '.join(LOADERS)}.")
    head = head_of(checkpoint)
    found = []
    for name in names:
        row = LOADERS[name]
        outcome = "unknown" if head is None else row.outcome(head)
        if checkpoint.form == "gguf" and name != "llama.cpp":
            outcome = "unknown"
        if checkpoint.entry is not None and needs_this_package(checkpoint.entry):
            # transformers does not look for a file of its name, and who reads any name lacks layers.
            outcome = "refuse" if row.outcome in (_transformers, _mlx) else "unknown"
        if checkpoint.form == "bin" and name == "mlx":  # it looks for safetensors alone
            outcome = "refuse"
        found.append(Forecast(name, outcome, row.rule, row.version, row.source, row.checked))
    return found
