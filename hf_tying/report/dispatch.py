"""`tying_report`: the one entry to the reports on models, on their files and on adapters."""

from pathlib import Path
from typing import TYPE_CHECKING

from .on_files import local_folder, report_on_files
from .records import TyingReport

if TYPE_CHECKING:
    from torch import nn


def tying_report(model_or_path: "nn.Module | str | Path") -> TyingReport:
    """Report what is tied in a live model or in a checkpoint.

    Of a checkpoint, `config.json` and the safetensors headers are read. No weight is loaded. Where a file has several
    names of a group, their bytes are compared. Code that comes with a checkpoint is never run. Without a `tying` entry
    in its config, the ties are those of the transformers class that the config names, built without weights.

    Args:
        model_or_path: a `PreTrainedModel`, also wrapped by PEFT, DDP or torch.compile; or a folder or Hub id. A
            Tied-LoRA adapter, live or in a folder, has a group for each factor that modules share.

    Returns:
        A `TyingReport`: `.groups`, `.findings`, `.ok`, `.to_dict()`, `.to_table()`, `.plot(path)`.

    Raises:
        TyingError: files are missing, truncated or malformed; or the object holds no `PreTrainedModel`.
    """
    if not isinstance(model_or_path, str | Path):
        from .on_model import report_on_model

        return report_on_model(model_or_path)
    folder = local_folder(model_or_path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        from .on_adapters import report_on_adapter

        return report_on_adapter(folder)
    return report_on_files(folder, source=str(model_or_path))
