"""What each loader will do with the softmax matrix of a file: one dated table of rules, and the forecast from it.

The row of transformers is checked by loading, in the tests. The others were read in their sources.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..config import TyingError
from ..report.checkpoint import Checkpoint
from ..report.stock_table import FLAG
from ..ties.depth_groups import needs_this_package
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
        flag: `tie_word_embeddings` as it stands in the file (of the text part, where that has it); `None`: absent.
        embedding: whether the file has the embedding.
        head: whether it has the softmax matrix.
        equal: whether both have the same values.
        sizes_fit: whether the rows are those that the config states.
    """

    tied: bool
    flag: bool | None
    embedding: bool
    head: bool
    equal: bool
    sizes_fit: bool


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
    if not head.embedding and not head.head:
        return "random head"
    if head.tied:
        return "tie" if not (head.embedding and head.head) or head.equal else "untie"
    if not head.embedding or not head.head:
        return "random head"
    return "duplicate" if head.equal else "untie"


def _by_flag(head: Head, missing: str, default: bool) -> str:
    if not head.sizes_fit or not head.embedding:
        return "refuse"
    if default if head.flag is None else head.flag:
        return "head dropped" if head.head and not head.equal else "tie"
    if not head.head:
        return missing
    return "duplicate" if head.equal else "untie"


def _llama_cpp(head: Head) -> str:
    if not head.embedding or not head.sizes_fit:
        return "refuse"
    if not head.head:
        return "tie"
    return "duplicate" if head.equal else "untie"


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
        "Ties by the flag alone, and skips the file's lm_head then; without the flag, a missing head is an error.",
        "00b5ad0",
        "vllm/model_executor/models/llama.py, model_loader/default_loader.py",
        "read",
        lambda head: _by_flag(head, "refuse", head.tied),
    ),
    "sglang": Loader(
        "Ties by the flag alone, and skips the file's lm_head then; without the flag, a missing head stays as it was "
        "allocated.",
        "0023954",
        "python/sglang/srt/models/llama.py, load_weights",
        "read",
        lambda head: _by_flag(head, "random head", head.tied),
    ),
    "llama.cpp": Loader(
        "Reads no flag: a GGUF file without output.weight has token_embd.weight for its softmax.",
        "master of 2026-11",
        "src/models/*.cpp, load_arch_tensors",
        "read",
        _llama_cpp,
    ),
    "mlx": Loader(
        "Ties by the flag, which is true where the file says nothing (llama), and drops the file's lm_head then; "
        "without the flag, a missing head is an error.",
        "17772c0",
        "mlx_lm/models/llama.py, sanitize",
        "read",
        lambda head: _by_flag(head, "refuse", True),
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
        tied, flag, fits = False, None, True
        held = [name in checkpoint.tensors for name in (embedding, head)]
    else:
        model = ModelFacts(checkpoint)
        if (pair := model.pair()) is None:
            return None
        held = [any(model.held(name) for name in _same(model, name)) for name in pair]
        embedding, head = (next(iter([n for n in _same(model, name) if model.held(name)] or [name])) for name in pair)
        tied = any(set(pair) <= set(chain) for chain in model.declared)
        flag = _flag(checkpoint.config)
        fits = not list(rows_and_vocabulary(Facts(checkpoint.source), model))
    equal = all(held) and checkpoint.values.equal(checkpoint.keys_of(embedding), checkpoint.keys_of(head))
    return Head(tied, flag, held[0], held[1], equal, fits)


def _same(model: ModelFacts, name: str) -> list[str]:
    """A name, and the carriers of its matrix: BART's file has `model.shared.weight`."""
    chain = next((chain for chain in model.stock.declared(model.config, flagged=False) if name in chain), [name])
    return [name, *(other for other in chain if other in model.stock.carriers and other != name)]


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
            outcome = "refuse" if row.outcome is _transformers else "unknown"
        found.append(Forecast(name, outcome, row.rule, row.version, row.source, row.checked))
    return found
