"""What a refusal is: an error with the words that matter, in time, and everything as it was."""

import copy
import hashlib
import json
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_tying import TyingConfig, TyingError, tie

from ..tiny import untied_model

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def picture(model: nn.Module) -> dict:
    """All that an act upon a model could change: its class, config and modules, parameters as objects and values."""
    config = getattr(model, "config", None)
    return {
        "class": type(model),
        "config": copy.deepcopy(config.to_dict()) if config is not None else None,
        "attributes": sorted(vars(model)),
        "groups": list(getattr(model, "tie_groups", [])),
        "mapping": dict(getattr(model, "all_tied_weights_keys", None) or {}),
        "parameters": {n: (id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)},
        "values": {n: digest(p) for n, p in model.named_parameters(remove_duplicate=False)},
        "modules": {n: type(m) for n, m in model.named_modules(remove_duplicate=False)},
    }


def digest(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return "meta"
    return hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()


def files(folder: Path) -> dict[str, str]:
    """Every file below `folder` with a hash of its bytes."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def slowness() -> float:
    """How many times longer a fixed piece of work takes here and now than on the machine that promises a second."""
    start = time.process_time()
    sum(hash(str(number)) for number in range(500_000))
    return (time.process_time() - start) / 0.06


@contextmanager
def refused(*words: str, model: nn.Module | None = None, folder: Path | None = None, by=TyingError, beyond=0.0):
    """The block raises an error whose message has all of `words`, in time, with `model` and `folder` as they were.

    The promise is a second, `beyond` what transformers itself needs to come that far. A machine that is slower, or
    that others slow down at this moment, has as much longer.
    """
    before = picture(model) if model is not None else None
    written = files(folder) if folder is not None else None
    start = time.process_time()  # of the processor: on the wall's clock a busy machine's neighbours count
    with pytest.raises(by) as error:
        yield
    taken = time.process_time() - start
    assert taken < 1.0 + beyond or taken < slowness() + beyond
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message) < 4000, "a message is for reading"
    if model is not None:
        after = picture(model)
        assert {key: after[key] for key in after if after[key] != before[key]} == {}
    if folder is not None:
        assert files(folder) == written


def tied_folder(folder: Path, save_format: str = "portable") -> Path:
    model = tie(untied_model("llama"), TyingConfig(scheme="two_way", save_format=save_format), init_from="target")
    model.save_pretrained(folder)
    return folder


def set_entry(folder: Path, entry) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tying": entry}))
