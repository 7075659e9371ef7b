"""`tying_report`: the one entry to the reports on models, on their files and on adapters."""

from pathlib import Path
from typing import TYPE_CHECKING

from .records import TyingReport

if TYPE_CHECKING:
    from torch import nn

    from .sources import Source


def tying_report(
    model_or_path: "nn.Module | str | Path",
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> TyingReport:
    """Report what is tied in a live model or in a checkpoint.

    Of a checkpoint, `config.json` and the headers of the weights are read; on the Hub, by ranges of bytes. No weight
    is loaded. Where a file has several names of a group, their bytes are compared: all of them up to a gigabyte, in
    samples beyond that and on the Hub. Code that comes with a checkpoint is never run. Without a `tying` entry in its
    config, the ties are those of the transformers class that the config names: from a table, without torch, or from
    the class itself, built without weights.

    Args:
        model_or_path: a `PreTrainedModel`, also wrapped by PEFT, DDP or torch.compile; or a folder, a file
            (`.safetensors`, `.bin`, `.gguf`), or `owner/name[@revision][/subfolder]` on the Hub. A Tied-LoRA adapter,
            live or in a folder, has a group for each factor that modules share.
        revision: branch, tag or commit on the Hub. Default: that in the name, or `main`.
        subfolder: folder inside of it. Default: none.
        token: token of the Hub. Default: the one that is logged in.

    Returns:
        A `TyingReport`: `.groups`, `.findings`, `.ok`, `.to_dict()`, `.to_table()`, `.plot(path)`.

    Raises:
        TyingError: files are missing, truncated or malformed; or the object holds no `PreTrainedModel`.
    """
    if not isinstance(model_or_path, str | Path):
        from .on_model import report_on_model

        return report_on_model(model_or_path)
    from .opening import open_source

    return report_on_source(open_source(model_or_path, revision, subfolder, token))


def report_on_source(source: "Source") -> TyingReport:
    """`tying_report` of a place that was opened.

    Raises:
        TyingError: see `tying_report`.
    """
    if is_adapter(source):
        from .on_adapters import report_on_adapter

        return report_on_adapter(source)
    from .checkpoint import read_checkpoint
    from .on_files import report_on_files

    return report_on_files(read_checkpoint(source))


def is_adapter(source: "Source") -> bool:
    """Whether there is an adapter and no model."""
    return source.only is None and source.has("adapter_config.json") and not source.has("config.json")
