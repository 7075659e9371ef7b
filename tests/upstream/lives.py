"""What a model does in its life, as facts that can be compared. Nothing here knows of ties that are held."""

import json
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from .. import zoo
from ..zoo_configs import vocabulary_sizes, words_of

#: By name, what is true of a model after something has been done to it.
Facts = dict[str, object]


def sharing(model: torch.nn.Module) -> list[list[str]]:
    """The names that are one parameter, sorted."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(sorted(group) for group in names.values() if len(group) > 1)


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def config_of(model: PreTrainedModel) -> dict:
    """The config without what this package writes into it."""
    return _plain(json.loads(json.dumps(model.config.to_dict(), default=str)))


def _plain(config: dict) -> dict:
    kept = {key: value for key, value in config.items() if key not in ("tying", "_name_or_path")}
    return {key: _plain(value) if isinstance(value, dict) else value for key, value in kept.items()}


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """What the config and the model say of the number of words."""
    found = vocabulary_sizes(model.config)
    return found | ({"model.vocab_size": model.vocab_size} if hasattr(model, "vocab_size") else {})


def outputs(model: PreTrainedModel) -> list[torch.Tensor] | str:
    """What one forward pass answers, or the error that it ends with."""
    torch.manual_seed(0)
    try:
        return tensors(model.eval()(**zoo.inputs(model)))
    except Exception as error:
        return line(error)


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor | None]:
    """By every name, the gradient of a sum over all that one forward pass answers."""
    answers = [tensor for tensor in outputs(model) if isinstance(tensor, torch.Tensor) and tensor.requires_grad]
    if answers:
        sum(tensor.float().sin().sum() for tensor in answers).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    model.zero_grad()
    return found


def line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def tensors(tree) -> list[torch.Tensor]:
    """The floating-point tensors of what a forward pass answers, in its order."""
    if isinstance(tree, torch.Tensor):
        return [tree] if tree.is_floating_point() else []
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def now(model: PreTrainedModel, folder: Path | None = None) -> Facts:
    """The model as it stands."""
    facts = {"sharing": sharing(model), "keys": list(model.state_dict()), "config": config_of(model)}
    facts["parameters"] = model.num_parameters()
    facts["first names"] = [name for name, _ in model.named_parameters()]
    return facts | {"outputs": outputs(model), "gradients": gradients(model)}


def file(model: PreTrainedModel, folder: Path) -> Facts:
    """What `save_pretrained` writes, and what loading it gives here."""
    model.save_pretrained(folder)
    written = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    config = _plain(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    names = sorted(path.name for path in folder.iterdir())
    return {"file": written, "config": config, "files": names} | loaded(type(model).__name__, folder)


def loaded(name: str, folder: Path, forward: bool = True) -> Facts:
    """What loading a folder gives here."""
    torch.manual_seed(1)  # for what the file does not have
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    facts = {key: sorted(map(str, info[f"{key}_keys"])) for key in ("missing", "unexpected", "mismatched")}
    facts |= {"sharing": sharing(model), "values": values(model)}
    return facts | ({"outputs": outputs(model)} if forward else {})


def changed(folder: Path, names: list[str], scratch: Path) -> Facts:
    """What is left of a folder's model after its task was changed: loaded and saved as each class but the last.

    Args:
        folder: of a saved model.
        names: of classes; as the last one it is loaded only.
        scratch: for the files between.
    """
    for i, name in enumerate(names[:-1]):
        torch.manual_seed(2 + i)
        model = getattr(transformers, name).from_pretrained(folder)
        folder = scratch / f"{i}_{name}"
        model.save_pretrained(folder)
    return loaded(names[-1], folder, forward=False)


def resized(model: PreTrainedModel, folder: Path, by: int) -> Facts:
    """The model with more or fewer words, and what its file gives then."""
    torch.manual_seed(3)  # for the new rows
    # New rows by the default: some classes do not take another way.
    words = words_of(model.config) + by
    model.resize_token_embeddings(words)
    facts = {
        "sharing": sharing(model),
        "words": words,
        "sizes": sizes(model),
        "shapes": shapes(model),
        "resized": values(model),
    }
    facts["config"] = config_of(model)
    model.save_pretrained(folder)
    again = loaded(type(model).__name__, folder, forward=False)
    return facts | {f"{key} after a load": value for key, value in again.items() if key != "values"}


def given_to(model: PreTrainedModel, plain: PreTrainedModel, assign: bool) -> Facts:
    """What `plain` is after a strict load of the model's state dict."""
    plain.load_state_dict(model.state_dict(), strict=True, assign=assign)
    return {"sharing": sharing(plain), "values": values(plain), "outputs": outputs(plain)}


def resumed(model: PreTrainedModel, folder: Path) -> Facts:
    """The model after `Accelerator.save_state`, some training, and `load_state`."""
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_state(folder)
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.add_(1)
    accelerator.load_state(folder)
    written = sorted(load_file(folder / "model.safetensors"))
    return {"sharing": sharing(prepared), "values": values(prepared), "file": written}


def task_classes(model: PreTrainedModel) -> list[str]:
    """The classes of other tasks over the same base: a classifier and the base model, as far as there are such."""
    kinds = ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "MODEL_MAPPING_NAMES")
    found = [getattr(modeling_auto, kind).get(model.config.model_type) for kind in kinds]
    return [name for name in found if isinstance(name, str) and name != type(model).__name__]


def difference(ours, theirs, place: str = "", tolerance: float = 0.0) -> str | None:
    """The first place where two facts differ, in words; `None` where they are equal, NaN to NaN.

    Args:
        tolerance: how far two numbers may be apart.
    """
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"{place}: {tuple(ours.shape)} {ours.dtype}, stock {tuple(theirs.shape)} {theirs.dtype}"
        if torch.equal(ours, theirs) or torch.allclose(ours, theirs, rtol=0, atol=tolerance, equal_nan=True):
            return None
        return f"{place}: values differ by up to {(ours.double() - theirs.double()).abs().max().item():.3g}"
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            more, fewer = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
            return f"{place}: has besides {more[:4]}, lacks {fewer[:4]}"
        pairs = [(ours[key], theirs[key], f"{place}.{key}") for key in ours]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
        if not any(isinstance(a, torch.Tensor | dict | list) for a in ours):
            pairs = [] if ours == theirs else [(str(ours)[:200], str(theirs)[:200], place)]
    else:
        return None if ours == theirs else f"{place}: {str(ours)[:300]}, stock {str(theirs)[:300]}"
    return next((found for a, b, at in pairs if (found := difference(a, b, at, tolerance))), None)
