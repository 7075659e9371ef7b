"""`export_layers`: a model with shared layers as files that need nothing of this package."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.tuners.tuners_utils import replicate_layers
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import TyingConfig, TyingError
from ..depth.sharing import unroll
from ..depth.stacks import grow, lists_by_layer
from ..peft.adapter_folder import write_adapter
from ..peft.relaxed import relaxed_adapter
from ..report.checkpoint import Checkpoint, read_checkpoint
from ..report.hub_folder import HubFolder
from ..report.opening import open_source
from ..ties.anatomy import Anatomy
from ..ties.classes import mixins_of, without_mixin
from ..ties.record import default_save_format, write_config
from ..ties.relaxation import Relaxation
from ..ties.relaxed import harden
from .new_folder import copy_files, new_folder, refuse_unloadable
from .rewriting import other_files, refuse_existing

FORMATS = ("unrolled", "lora")
#: Where in the folder of an adapter its base model is.
BASE = "base"


def export_layers(
    source: str | Path,
    out: str | Path,
    format: str = "unrolled",
    *,
    replicate: bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Write a model with shared layers for loaders that do not know this package. `source` is left as it is.

    Args:
        source: a folder, or an id on the Hub, of a model with shared layers, of a class of transformers.
        out: the new folder; it must not exist, or be empty.
        format: `"unrolled"`: a plain model that has every layer, of the same function. `"lora"`, of layers relaxed by
            low ranks: their differences as an ordinary PEFT adapter, and in `out/base` its base model, whose layers
            are exactly the shared blocks.
        replicate: of `"lora"`: whether the base model has each block once, and the adapter repeats it
            (`LoraConfig.layer_replication`). Default `None`: where PEFT makes the same layers in this way.
        revision: branch, tag or commit on the Hub.
        subfolder: folder inside of `source`.
        token: token of the Hub.

    Returns:
        `out`.

    Raises:
        TyingError: nothing is shared; layers have a factor of what they add (`grow=True`), which no plain layer has;
            differences that are no LoRA; blocks that PEFT does not repeat, with `replicate=True`. Nothing is written.
    """
    if format not in FORMATS:
        raise TyingError(f"Unknown format {format!r:.80}: expected one of {', '.join(FORMATS)}.")
    if replicate is not None and format != "lora":
        raise TyingError(f"replicate={replicate} is for the format 'lora': {format!r} has every layer.")
    checkpoint = read_checkpoint(open_source(source, revision, subfolder, token))
    out = Path(out)
    refuse_existing(out)
    _refuse_unshared(checkpoint, format)
    model = _loaded(checkpoint)
    copied, _ = other_files(checkpoint)
    if format == "unrolled":
        _make_plain(model)
        with new_folder(checkpoint, out, copied) as folder:
            _save(model, folder)
        return out
    config, tensors = relaxed_adapter(model)
    blocks = None if replicate is False else _blocks(model, required=replicate is True)
    _make_plain(harden(model))
    if blocks is not None:
        path, firsts, config.layer_replication = blocks
        grow(model, path, firsts)
    config.base_model_name_or_path = str(out / BASE)
    config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    with new_folder(checkpoint, out, []) as folder:
        (folder / BASE).mkdir()
        copy_files(checkpoint, folder / BASE, copied)
        _save(model, folder / BASE)
        write_adapter(config, tensors, folder)
    return out


def _refuse_unshared(checkpoint: Checkpoint, format: str) -> None:
    name, entry = checkpoint.source.name, checkpoint.entry
    by_class = checkpoint.config.get("model_type") == "albert"
    if checkpoint.source.only or not checkpoint.config or (entry is None or not entry.depth) and not by_class:
        raise TyingError(f"{name} has no shared layers: expected a folder of a model after share_layers(model, ...).")
    depth = entry.depth if entry is not None else []
    for stack in depth:
        if damped := stack.get("damped"):
            raise TyingError(
                f"{name} has been grown: layers {damped} of {stack['path']!r} have a factor of what they add, and no "
                "plain layer has. It is read by this package alone."
            )
    if format == "lora" and not any("relax" in stack and not stack.get("unrolled") for stack in depth):
        raise TyingError(
            f"{name} has layers that are shared exactly, and no differences for an adapter: expected "
            "share_layers(model, ..., relax={'rank': ...}). The format 'unrolled' writes the plain model."
        )


def _loaded(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model on the CPU, in the dtype of its files."""
    cls: Any = getattr(transformers, checkpoint.architecture, None)
    if cls is None:
        raise TyingError(
            f"transformers has no {checkpoint.architecture}: load the model, unroll(model) and save_pretrained."
        )
    source = checkpoint.source
    try:
        if isinstance(source, HubFolder):
            place = {"revision": source.revision, "subfolder": source.subfolder.rstrip("/"), "token": source.token}
            return cls.from_pretrained(source.repo, dtype="auto", **place)
        return cls.from_pretrained(source.path(), dtype="auto")
    except (ValueError, RuntimeError, OSError) as error:
        raise TyingError(f"{source.name} cannot be loaded: {error}") from error


def _make_plain(model: PreTrainedModel) -> None:
    """Give each layer parameters of its own, and forget that they were shared."""
    depth = TyingConfig.in_config(model.config).depth
    if not depth or any(not stack.get("unrolled") for stack in depth):
        unroll(model)
    if depth:
        write_config(model, depth=[], save_format=None)


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Save `model`, without an entry that says no more than its class does, and load it."""
    model.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    by_class = "tying" in config and default_save_format(Anatomy(model)) == "dedup"
    if by_class and not TyingConfig.in_config(config).declared_extensions():
        del config["tying"]
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    refuse_unloadable(folder)


# --- blocks that PEFT repeats ----------------------------------------------------------------------------------------


def _blocks(model: PreTrainedModel, required: bool) -> tuple[str, list[int], list[tuple[int, int]]] | None:
    """Path of the stack, first visit of each block, and the `layer_replication` that makes its layers.

    `None` where PEFT makes other layers.

    Raises:
        TyingError: then, if it is `required`.
    """
    depth = TyingConfig.in_config(model.config).depth
    path, order = depth[0]["path"], depth[0]["order"]
    firsts = [order.index(block) for block in dict.fromkeys(order)]
    if len(depth) > 1:
        why = "has several shared stacks"
    elif depth[0].get("private"):
        why = "has parts of layers that are not shared"
    else:
        place = {order[first]: i for i, first in enumerate(firsts)}
        pieces: list[tuple[int, int]] = []
        for block in (place[each] for each in order):
            if pieces and pieces[-1][1] == block:
                pieces[-1] = pieces[-1][0], block + 1
            else:
                pieces.append((block, block + 1))
        if (why := _why_not_repeated(model, path, firsts, pieces)) is None:
            return path, firsts, pieces
    if required:
        raise TyingError(
            f"PEFT cannot repeat the blocks of {type(model).__name__}, which {why}: leave replicate=True out for a "
            "base model with every layer."
        )
    return None


def _why_not_repeated(
    model: PreTrainedModel, path: str, firsts: list[int], pieces: list[tuple[int, int]]
) -> str | None:
    """What keeps `layer_replication` from making the layers of `model`: the end of a sentence."""
    layers = model.get_submodule(path)
    if lists := lists_by_layer(model.config, len(firsts), len(layers._modules)):
        return f"reads {lists[0]!r} of its config for each layer"
    cls = type(model)
    for mixin in mixins_of(cls):
        cls = without_mixin(mixin, cls)
    config = copy.deepcopy(model.config)
    vars(config).pop("tying", None)
    with torch.device("meta"):
        twin = cls(config)
    try:
        grow(twin, path, firsts)
        replicate_layers(twin, pieces)
    except (TyingError, ValueError) as error:
        return f"is not made so ({error})"
    made = twin.get_submodule(path)
    if len(made._modules) != len(layers._modules):
        return f"has its layers at {path!r}, where PEFT does not look"
    for i, (layer, other) in enumerate(zip(layers.children(), made.children(), strict=True)):
        modules = {name: each for name, each in layer.named_modules() if not isinstance(each, Relaxation)}
        others = dict(other.named_modules())
        if modules.keys() != others.keys():
            return f"has other modules in layer {i}"
        for name, module in modules.items():
            if _settings(module) != _settings(others[name]):
                return f"has settings of its own in {name!r} of layer {i}"
    return None


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module that its forward may read."""
    plain = (bool, int, float, str, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, plain) and name != "training" and not name.startswith("_")
    }
