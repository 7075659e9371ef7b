"""The two forms in which FSDP writes a model and its optimizer: whole (`FULL_STATE_DICT`), or in shards."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import Trainer

WHOLE, SHARDS = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


def form_of(folder: str | os.PathLike[str]) -> str | None:
    """The form of the files in a checkpoint of FSDP; `None` for any other checkpoint."""
    folder = Path(folder)
    if (folder / "pytorch_model_fsdp.bin").is_file():
        return WHOLE
    return SHARDS if (folder / "pytorch_model_fsdp_0").is_dir() else None


def fsdp_of(trainer: Trainer) -> FullyShardedDataParallelPlugin | None:
    """The settings of FSDP of a run, if it has any."""
    return getattr(trainer.accelerator.state, "fsdp_plugin", None)


def set_form(fsdp: FullyShardedDataParallelPlugin, form: str) -> Callable[[], None]:
    """Let FSDP read and write files of `form`. What it returns takes that back."""
    # Each form has settings of its own, which `set_state_dict_type` makes only where there are none.
    names = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
    own: dict[str, Any] = {name: getattr(fsdp, name) for name in names}
    fsdp.state_dict_config = fsdp.optim_state_dict_config = None
    fsdp.set_state_dict_type(form)
    return lambda: vars(fsdp).update(own)
