"""Diseases of what is declared: flags, the `tying` entry, sizes in the config."""

from collections.abc import Iterator
from typing import Any

from ..report.records import Finding
from ..report.stock_table import FLAG, config_defaults
from .facts import Facts, ModelFacts

_WRAPPERS = ("encoder-decoder", "speech-encoder-decoder", "vision-encoder-decoder")


def head_is_random(facts: Facts, model: ModelFacts) -> Iterator[Finding]:
    """T002: nothing ties a name that the file lacks: a loader makes it of random numbers."""
    for chain in model.switched_off:
        used = [name for name in chain if name not in model.stock.carriers]
        missing = [name for name in used if not model.held(name) and not any(name in g for g in model.recorded)]
        present = [name for name in used if model.held(name)]
        if present and missing:
            yield Finding(
                "T002",
                "error",
                f"{FLAG} is false, so that nothing ties {missing[0]!r} to {present[0]!r}, and the file does not have "
                f"it: loaders fill {missing[0]!r} with random numbers.",
                f"hf-tying tie {facts.name} {model.scheme_of(chain)} OUT, which sets the flag; or save the model with "
                "its own head.",
            )


def entry_and_flag(facts: Facts, model: ModelFacts) -> Iterator[Finding]:
    """T004: the `tying` entry says one thing, `tie_word_embeddings` another."""
    entry, pair = model.checkpoint.entry, model.pair()
    if entry is None or pair is None or model.stock.forced is not None:
        return
    if any(set(pair) & entry.relaxed_names(name) for name in entry.relax if set(pair) <= set(entry.groups[name])):
        return  # to others it is no tie, and the flag says so
    ties = any(set(pair) <= group for group in model.recorded)
    by_class = any(set(pair) <= set(chain) for chain in model.declared)
    can = any(set(pair) <= set(chain) for chain in model.stock.declared(model.config, flagged=False))
    if ties and not by_class and can:
        lost = [name for name in pair if not model.held(name)]
        effect = f"plain transformers fills {lost[0]!r} with random numbers" if lost else "others load it untied"
        yield Finding(
            "T004",
            "error",
            f"the `tying` entry ties {pair[1]!r} to {pair[0]!r}, and {FLAG} is false: hf_tying refuses the file, and "
            f"{effect}.",
            f'Set "{FLAG}": true in config.json; or hf-tying untie {facts.name} OUT.',
        )
    elif by_class and not ties and entry.scheme is not None and entry.scheme not in ("two_way", "three_way"):
        yield Finding(
            "T004",
            "error",
            f"the `tying` entry has scheme {entry.scheme!r}, and {FLAG} is true: plain transformers ties "
            f"{pair[1]!r} to {pair[0]!r} where the file has one of them, or both with the same values.",
            f'Set "{FLAG}": false in config.json; or hf-tying tie {facts.name} two_way OUT --init-from target.',
        )


def rows_and_vocabulary(facts: Facts, model: ModelFacts) -> Iterator[Finding]:
    """T005: `vocab_size` is not the rows of the matrix."""
    said = set()
    for role, fields in model.stock.sizes.items():
        names = [name for name in model.stock.roles[role] if model.held(name)]
        sizes = {field: size for field in fields if (size := _lookup(model.config, field)) is not None}
        if not names or not sizes:
            continue
        shape, dtype = model.checkpoint.matrix(names[0])
        if len(shape) < 2 or shape[0] in sizes.values() or dtype[0] in "IU":  # packed integers of a quantised matrix
            continue
        field, size = next(iter(sizes.items()))
        if (field, shape[0]) not in said:
            said.add((field, shape[0]))
            yield Finding(
                "T005",
                "error",
                f"config.json has {field} = {size!r:.40}, and {names[0]!r} has {shape[0]:,} rows: loaders refuse the "
                "file, or leave the matrix random where they are told to ignore mismatched sizes.",
                f'Set "{field}": {shape[0]} in config.json.',
            )


def flag_of_a_wrapper(facts: Facts, model: ModelFacts) -> Iterator[Finding]:
    """T010: an encoder-decoder made of two models ignores the flag that it carries."""
    config = model.config
    if config.get("model_type") not in _WRAPPERS or model.checkpoint.entry is not None:
        return
    old = config.get("tie_encoder_decoder") is True
    if old or config.get(FLAG) is True:
        flag = "tie_encoder_decoder" if old else FLAG
        yield Finding(
            "T010",
            "warning",
            f"config.json has {flag} = true, which transformers ignores for {config.get('model_type')!r}: the two "
            "models inside are loaded with a matrix for each name.",
            "Load it with hf_tying.models.TiedEncoderDecoderModel, and tie(model, 'three_way').",
        )


def flag_of_a_part(facts: Facts, model: ModelFacts) -> Iterator[Finding]:
    """T011: a config inside has the flag, and the class reads that of another place."""
    if model.checkpoint.entry is not None or model.stock.forced is not None:
        return
    read = {path for _, _, path in model.stock.ties}
    pair = model.pair()
    if pair is None or not read:
        return
    tied = any(set(pair) <= set(chain) for chain in model.declared)
    parts = {"": model.config, **{k: v for k, v in model.config.items() if isinstance(v, dict)}}
    for path, part in parts.items():
        flag = part.get(FLAG)
        words = path == "" or "vocab_size" in part or path in ("text_config", "decoder", "llm_config")
        if path not in read and words and flag is True and not tied:
            where, other = path or "the top of config.json", next(iter(read)) or "the top of config.json"
            yield Finding(
                "T011",
                "warning",
                f"{FLAG} is true in {where}, and {model.checkpoint.architecture} reads that of {other}, where it is "
                "not: transformers does not tie, and loaders that read the other one do.",
                f'Set "{FLAG}" to the same value in both places of config.json.',
            )


def projection_in_a_stock_class(facts: Facts, model: ModelFacts) -> Iterator[Finding]:
    """T014: a projection before the softmax (PR) that only this package knows."""
    entry = model.checkpoint.entry
    if entry is not None and entry.projection is not None and not model.config.get("auto_map"):
        yield Finding(
            "T014",
            "error",
            f"the `tying` entry has a projection before the softmax, and {model.checkpoint.architecture} has none: "
            "without hf_tying the model loads and computes another function.",
            f"hf-tying convert {facts.name} OUT --to merged, or publish a class of your own with its code "
            "(register_for_auto_class).",
        )


def _lookup(config: dict[str, Any], field: str) -> int | None:
    """A size in the config; the default of its class where the file leaves it out."""
    path, _, name = field.rpartition(".")
    part = config.get(path) if path else config
    if not isinstance(part, dict):
        return None
    value = part.get(name, config_defaults(part.get("model_type")).get(name))
    return value if isinstance(value, int) and not isinstance(value, bool) else None
