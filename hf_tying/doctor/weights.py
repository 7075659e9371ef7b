"""Diseases of what the weight files hold: copies, dead and missing tensors, pickles."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod

from ..config import TyingError
from ..report.checkpoint import Checkpoint, counts_in
from ..report.dtypes import bytes_of
from ..report.records import Finding
from ..report.stock_building import build
from ..report.stock_table import generalised, part_of
from ..report.stock_ties import stock_ties
from ..report.text import size
from .facts import Facts, ModelFacts
from .flags import entry_and_flag

_LAYERS = re.compile(r"\w*(num_hidden_layers|n_layers?|num_layers|\w+_layers)")
_SHOWN = 5


def order_decides(facts: Facts, model: ModelFacts) -> Iterator[Finding]:
    """T009: the root of a tie is not in the file, and its other names have several values."""
    for group in facts.report.groups if facts.report else ():
        if not group.apart or group.root in (group.in_file or []) or model.checkpoint.entry is not None:
            continue
        yield Finding(
            "T009",
            "warning",
            f"group {group.name!r}: the file lacks {group.root!r}, to which the class ties the others, and has "
            f"{len(group.in_file or [])} others that differ: which of them counts depends on the order of loading.",
            f"hf-tying untie {facts.name} OUT, or hf-tying tie {facts.name} SCHEME OUT --init-from ROLE.",
            group.name,
        )


def otherwise_without_the_entry(facts: Facts, model: ModelFacts) -> Iterator[Finding]:
    """T023: the file leaves out names of the entry, and the class fills them with something else."""
    checkpoint = model.checkpoint
    reports = facts.report.groups if facts.report else []
    groups = [[name for name in group.names if name not in group.apart] for group in reports]
    by_class = {frozenset(chain) for chain in model.declared}
    missing = any(not model.held(name) for names in groups for name in names if frozenset(names) not in by_class)
    entry = checkpoint.entry
    if not facts.thorough or entry is None or entry.depth or entry.relax or not missing:
        return
    if any(entry_and_flag(facts, model)):  # T004 says it, and hf_tying refuses the file
        return
    built = build({key: value for key, value in model.config.items() if key != "tying"}, checkpoint.architecture)
    if built is None:
        return
    found = stock_ties(built, checkpoint, groups)
    if names := found.random or found.wrong:
        filled = "random numbers" if found.random else "the values of another matrix"
        yield Finding(
            "T023",
            "warning",
            f"the `tying` entry fills names that the file leaves out, and plain transformers fills {names[0]!r} with "
            f"{filled}.",
            f"hf-tying convert {facts.name} OUT --to portable.",
        )


def written_twice(facts: Facts, model: ModelFacts) -> Iterator[Finding]:
    """T006: names that the class ties by itself stand in the file several times."""
    checkpoint = model.checkpoint
    for group in facts.report.groups if facts.report else ():
        names = group.in_file or []
        copies = len(names) - 1
        if group.status != "tied" or copies < 1 or checkpoint.entry is not None or len(group.shape) < 2:
            continue
        wasted = copies * sum(checkpoint.tensors[key].size for key in checkpoint.keys_of(names[0]))
        yield Finding(
            "T006",
            "warning",
            f"group {group.name!r}: one matrix is written {copies + 1} times ({', '.join(map(repr, names))}), "
            f"and {size(wasted)} are wasted: loaders that know the class tie it by themselves.",
            f"hf-tying convert {facts.name} OUT --to dedup.",
            group.name,
        )


def written_twice_for_llama_cpp(facts: Facts, model: ModelFacts) -> Iterator[Finding]:
    """T006 in a GGUF file, which needs no `output.weight` where it is the embedding."""
    checkpoint, names = model.checkpoint, ("token_embd.weight", "output.weight")
    if checkpoint.form != "gguf" or not all(name in checkpoint.tensors for name in names):
        return
    embedding, head = (checkpoint.tensors[name] for name in names)
    if head.size and embedding.kind == head.kind and checkpoint.values.equal([names[0]], [names[1]]):
        yield Finding(
            "T006",
            "warning",
            f"token_embd.weight and output.weight are equal, and {size(head.size)} are wasted: llama.cpp takes the "
            "embedding where a file has no output.weight.",
            "Tie the model that it was made from (hf-tying tie), and convert that again.",
        )


def equal_and_untied(facts: Facts, model: ModelFacts) -> Iterator[Finding]:
    """T007: two matrices are equal, and nothing ties them."""
    checkpoint = model.checkpoint
    if checkpoint.entry is not None:
        return
    for chain in model.switched_off:
        used = [name for name in chain if name not in model.stock.carriers and model.held(name)]
        if len(used) < 2 or len(checkpoint.matrix(used[0])[0]) < 2:
            continue
        numbers, compared = checkpoint.values.different({name: checkpoint.keys_of(name) for name in used})
        same = [name for name in used if numbers[name] == numbers[used[0]]]
        if len(same) > 1:
            shape, dtype = checkpoint.matrix(same[0])
            bytes_saved = (len(same) - 1) * prod(shape) * bytes_of(dtype)
            samples = " in all samples" if compared == "samples" else ""
            yield Finding(
                "T007",
                "warning",
                f"{' and '.join(map(repr, same))} are equal{samples}, and tie_word_embeddings is false: they could be "
                f"one ({size(bytes_saved)} less). Training will let them drift apart.",
                f"hf-tying tie {facts.name} {model.scheme_of(chain)} OUT; or leave it, if they are to differ.",
            )


def merged_into_one_side(facts: Facts, model: ModelFacts) -> Iterator[Finding]:
    """T013: what is declared to be one differs by a matrix of low rank, as a merged adapter leaves it."""
    checkpoint = model.checkpoint
    for group in facts.report.groups if facts.report else ():
        if group.status != "broken" or not group.apart or len(group.shape) != 2:
            continue
        one, other = (checkpoint.keys_of(name) for name in (group.in_file[0], group.apart[0]))
        found = checkpoint.values.difference(one[0], other[0]) if len(one) == len(other) == 1 else None
        if found is not None and found.rank is not None:
            yield Finding(
                "T013",
                "error",
                f"group {group.name!r}: {group.in_file[0]!r} and {group.apart[0]!r} differ by a matrix of rank "
                f"{found.rank}: an adapter was merged into one side, and the config still says that they are one. A "
                "loader that believes it loses the merge, or gives it to both sides.",
                f"hf-tying untie {facts.name} OUT.",
                group.name,
            )


def pickles(facts: Facts, model: ModelFacts) -> Iterator[Finding]:
    """T020: a pickle, and the names that are one storage in it."""
    pickled = model.checkpoint.pickled
    if pickled is None:
        return
    shared = "; ".join(" = ".join(map(repr, names)) for names in pickled.aliases()[:_SHOWN])
    yield Finding(
        "T020",
        "info",
        "the weights are a pickle, which other loaders run code from"
        + (f"; in it these names are one storage: {shared}." if shared else "."),
        f"hf-tying convert {facts.name} OUT --to portable writes safetensors.",
    )


def counts(facts: Facts, model: ModelFacts) -> Iterator[Finding]:
    """T021, T022: tensors that the class does not have; layers, tensors and shapes that the file does not have."""
    checkpoint = model.checkpoint
    if checkpoint.twice:
        yield Finding(
            "T022",
            "error",
            f"{_listed(checkpoint.twice)} in several of the files: which one counts depends on the order of loading.",
            "Save the model again.",
        )
    try:
        checkpoint.refuse_counts()
    except TyingError as error:
        yield Finding("T022", "error", str(error), "Correct config.json.")
        return
    if checkpoint.stock is None or not (facts.thorough or suspicious(checkpoint)):
        return
    if checkpoint.config.get("quantization_config"):  # its tensors are those of the quantiser
        return
    yield from _against_class(facts, checkpoint)


def has_wild_counts(checkpoint: Checkpoint) -> bool:
    """Whether the config asks for more layers or experts than the files can have tensors for."""
    try:
        checkpoint.refuse_counts()
    except TyingError:
        return True
    return False


def suspicious(checkpoint: Checkpoint) -> bool:
    """Whether names or counts are not what the table expects, so that it is worth asking the class."""
    parts = set(checkpoint.stock.parts) if checkpoint.stock else set()
    if parts and any(part_of(name) not in parts for name in checkpoint.tensors):
        return True
    stated = {value for name, value in counts_in(checkpoint.config) if _LAYERS.fullmatch(name.rpartition(".")[2])}
    return bool(stated) and not set(_layers(checkpoint.tensors).values()) <= stated


def _layers(names: Iterable[str]) -> dict[str, int]:
    """How many modules each list of modules has, the outermost ones, by their paths."""
    found: dict[str, int] = {}
    for name in names:
        path, _, rest = generalised(name).partition(".*")
        if rest or ".*" in generalised(name):
            index = name[len(path) + 1 :].partition(".")[0]
            if index.isdecimal():
                found[path] = max(found.get(path, 0), int(index) + 1)
    return found


def _against_class(facts: Facts, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Compare the names and shapes in the files with those of the class."""
    from ..report.stock_building import matches, shapes_in_files

    try:
        built = checkpoint.built
    except TyingError as error:
        yield Finding("T022", "error", str(error), "Correct config.json, or save the model again.")
        return
    if built is None:
        return
    expected, optional = shapes_in_files(built)
    reachable = {key for _, names in checkpoint.groups if any(map(checkpoint.keys_of, names)) for name in names
                 for key in checkpoint.stock.keys.get(name, [name])}  # fmt: skip
    matched = {name for pair in checkpoint.stock.roles.values() for name in pair}
    missing = {n: s for n, s in expected.items() if n not in checkpoint.tensors and n not in reachable | optional}
    extra = {n: t.shape for n, t in checkpoint.tensors.items()
             if n not in expected and not matches(n, built._keys_to_ignore_on_load_unexpected)}  # fmt: skip
    # Names of an older form, which loaders rename: as many tensors of the same shapes under other names.
    old = Counter(missing.values()) & Counter(extra.values())
    for kind in (missing, extra):
        left = old.copy()
        for name in [*kind]:
            if left[kind[name]] > 0:
                left[kind[name]] -= 1
                del kind[name]
    # A head without a name here, which T002 and T003 tell of.
    missing = {n: s for n, s in missing.items() if n not in matched}
    if missing:
        yield Finding(
            "T022",
            "error",
            f"the config makes a {checkpoint.architecture} with {len(missing):,} tensors that the files lack "
            f"({_listed(missing)}): loaders fill them with random numbers.",
            "Correct the sizes in config.json, or save the model again.",
        )
    sized = {
        n: (checkpoint.tensors[n].shape, s)
        for n, s in expected.items()
        if n in checkpoint.tensors and checkpoint.tensors[n].shape != s and n not in matched
    }
    if sized:
        name, (found, wanted) = next(iter(sized.items()))
        yield Finding(
            "T022",
            "error",
            f"{len(sized):,} tensors do not have the shapes of a {checkpoint.architecture} with this config: "
            f"{name!r} is {list(found)}, expected {list(wanted)}. Loaders refuse the file.",
            "Correct the sizes in config.json.",
        )
    if extra:
        wasted = sum(checkpoint.tensors[name].size for name in extra)
        yield Finding(
            "T021",
            "warning",
            f"{checkpoint.architecture} has no place for {_listed(extra)} ({size(wasted)}): loaders leave "
            f"{'it' if len(extra) == 1 else 'them'} out.",
            "Save the model again, or name the class that has them in config.json.",
        )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(f"{name!r:.120}" for name in names[:_SHOWN]) + more
