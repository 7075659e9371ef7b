"""Checkpoints that are whole: a seal that is written last, and the newest checkpoint that fits its own.

Trainer writes a checkpoint in place, and resumes from the folder with the highest number. A run that was killed while
it wrote leaves a part there. `seal_checkpoint` writes what a whole one consists of (`complete.json`);
`last_complete_checkpoint` passes over what does not fit.
"""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..config import TyingError
from ..ties.across_ranks import from_every_rank, rank_and_size
from ..ties.headers import read_json, refuse_broken, shard_names
from .fsdp_files import SHARDS, form_of

logger = logging.get_logger(__name__)

SEAL = "complete.json"
VERSION = 1
_FOLDER = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")
_STATE = "trainer_state.json"
_WEIGHTS = (".safetensors", ".bin", ".distcp")
_NO_WEIGHTS = ("optimizer", "training_args")
# Where Trainer and the engines keep the state of the optimizer.
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*", "optimizer.safetensors")


def seal_checkpoint(folder: str | os.PathLike[str], step: int, tying: dict[str, Any] | None = None) -> None:
    """Write `complete.json` into a checkpoint that is whole: its files are on the disk before, and it is after.

    `TyingCallback` does so for each checkpoint of a Trainer. In a loop of one's own: once all processes have written
    their files, by one of them.

    Args:
        folder: of the checkpoint.
        step: number of the last optimizer step in it.
        tying: the `tying` entry of the model's config, for a checkpoint without `config.json` (of shards, of an
            adapter). Default `None`: it has none.
    """
    folder = Path(folder)
    files = list(_files(folder))
    for path in files:
        _sync(path)
    seal = {
        "version": VERSION,
        "step": step,
        "tying": read_json(config).get("tying") if (config := folder / "config.json").is_file() else tying,
        "files": {_name(path, folder): path.stat().st_size for path in files},
        "sha256": {_name(path, folder): _sha256(path) for path in files if path.suffix in _WEIGHTS},
    }
    fresh = folder / f".{SEAL}"
    with open(fresh, "w", encoding="utf-8") as file:
        json.dump(seal, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, folder / SEAL)
    _sync(folder)


def last_complete_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint in `folder` from which a run can be resumed; those passed over are told, with the reason.

    One with a seal has to fit it: every file with its size, the weights with their SHA-256. One without (of a run
    without `TyingCallback`, or killed just before it was written) is looked at as it is: the state of the trainer is
    for its step, headers of weights cover their files, the checksums inside of torch's files are right, and an
    optimizer is there if a scheduler is. Nothing is deleted. Of several processes all must call it; process 0 looks.

    Args:
        folder: where Trainer has its checkpoints, its `output_dir`.

    Returns:
        The path, for `trainer.train(resume_from_checkpoint=...)`; `None` where there is none to resume from.

    Example:
        >>> trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    """
    return from_every_rank(_last_complete(Path(folder)) if rank_and_size()[0] == 0 else None)[0]


def _last_complete(folder: Path) -> str | None:
    found = [(int(match[1]), path) for path in _listed(folder) if (match := _FOLDER.match(path.name))]
    for step, path in sorted(found, reverse=True):
        if (why := why_incomplete(path, step)) is None:
            logger.info(f"Resuming from {path}.")
            return str(path)
        logger.warning(f"{path} is passed over: {why}")
    if found:
        logger.warning(f"None of the {len(found)} checkpoints in {folder} is complete: nothing to resume from.")
    return None


def why_incomplete(folder: str | os.PathLike[str], step: int | None = None) -> str | None:
    """Why a run cannot be resumed from the checkpoint in `folder`, as a sentence; `None` if it can.

    Args:
        folder: of the checkpoint.
        step: that it should be of. Default `None`: any.
    """
    folder = Path(folder)
    try:
        if (folder / SEAL).exists():
            _refuse_unlike_seal(folder, step)
        else:
            _refuse_partial(folder, step)
        for path in _files(folder):
            _refuse_broken_zip(path)
    except TyingError as error:
        return str(error)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        return f"it cannot be read ({type(error).__name__}: {error})."
    return None


def has_optimizer(folder: str | os.PathLike[str]) -> bool:
    """Whether the state of the optimizer is in a checkpoint."""
    return any(any(Path(folder).glob(name)) for name in _OPTIMIZERS)


def refuse_other_engine(folder: str | os.PathLike[str], args: TrainingArguments) -> None:
    """Whether `Trainer` can load the optimizer in `folder` with the engine of this run.

    Raises:
        TyingError: for a checkpoint of another engine, or of DeepSpeed with another number of processes, with the way
            to go on from its weights.
    """
    alone = f"--model_name_or_path {folder}, another --output_dir, no --resume_from_checkpoint."
    wrote, runs = _engine_that_wrote(Path(folder)), _engine_of(args)
    if wrote != runs:
        merge = ""
        if form_of(folder) == SHARDS:
            merge = f", after `accelerate merge-weights {folder}/pytorch_model_fsdp_0 {folder}`"
        raise TyingError(
            f"{folder} was written by {wrote}, and this run is {runs}: Trainer cannot load the state of that "
            f"optimizer. Resume with the engine that wrote it; or go on from its weights alone{merge}: {alone}"
        )
    states = Path(folder).glob("global_step*/*zero_pp_rank_*_optim_states.pt")
    ranks = {match[1] for path in states if (match := re.search(r"zero_pp_rank_(\d+)_", path.name))}
    if ranks and len(ranks) != args.world_size:
        raise TyingError(
            f"{folder} was written by {len(ranks)} processes of DeepSpeed, and this run has {args.world_size}: "
            f"DeepSpeed cannot load the state of an optimizer that was split for another number. Start {len(ranks)} "
            f"processes; or go on from its weights alone: {alone}"
        )


def _engine_that_wrote(folder: Path) -> str:
    if (folder / "latest").exists() or any(folder.glob("global_step*")):
        return "DeepSpeed"
    if any(folder.glob("pytorch_model_fsdp*")) or (folder / "optimizer.bin").exists():
        return "FSDP"
    return "one process or DistributedDataParallel"


def _engine_of(args: TrainingArguments) -> str:
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return "DeepSpeed"
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "FSDP"
    return "one process or DistributedDataParallel"


def _refuse_unlike_seal(folder: Path, step: int | None) -> None:
    seal = read_json(folder / SEAL)
    if not {"step", "files", "sha256"} <= seal.keys():
        raise TyingError(f"{SEAL!r} is not one that this package has written.")
    if step is not None and seal["step"] != step:
        raise TyingError(f"it is of step {seal['step']}, by {SEAL!r}.")
    for name, size in seal["files"].items():
        path = folder / name
        if not path.exists():
            raise TyingError(f"{name!r} is missing.")
        if path.stat().st_size != size:
            raise TyingError(f"{name!r} has {path.stat().st_size} bytes, and had {size} when it was complete.")
    for name, sha256 in seal["sha256"].items():
        if _sha256(folder / name) != sha256:
            raise TyingError(f"{name!r} has other bytes than when it was complete: it was damaged, or replaced.")
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("tying") != seal.get("tying"):
        raise TyingError("the `tying` entry of 'config.json' is not the one that it had when it was complete.")


def _refuse_partial(folder: Path, step: int | None) -> None:
    """Look at a checkpoint without a seal."""
    if not (folder / _STATE).exists():  # which Trainer writes last
        raise TyingError(f"{_STATE!r} is missing: the run ended while it was written.")
    state = read_json(folder / _STATE)
    if step is not None and state.get("global_step") != step:
        raise TyingError(f"{_STATE!r} is of step {state.get('global_step')}.")
    weights = [path for path in _files(folder) if path.suffix in _WEIGHTS and not path.name.startswith(_NO_WEIGHTS)]
    if not weights:
        raise TyingError("it has no weights.")
    for index in folder.glob("*.index.json"):
        if missing := [name for name in shard_names(index) if not (folder / name).is_file()]:
            raise TyingError(f"{index.name!r} names files that are not there: {missing}.")
    refuse_broken([str(path) for path in weights])
    if (folder / "scheduler.pt").exists() and not has_optimizer(folder):
        raise TyingError("it has a scheduler and no optimizer.")
    if (folder / "optimizer.pt").exists() and not (folder / "scheduler.pt").exists():
        raise TyingError("it has an optimizer and no scheduler.")


def _refuse_broken_zip(path: Path) -> None:
    """What `torch.save` writes is a ZIP archive, with a checksum of each part, and its directory at the end."""
    if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
        raise TyingError(f"{path.name!r} is not whole: its directory is missing at the end.")
    if path.suffix in (".pt", ".pth", ".bin") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (broken := archive.testzip()) is not None:
                raise TyingError(f"{path.name!r} is damaged: the checksum of {broken!r} inside it is wrong.")


def _listed(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _files(folder: Path) -> Iterator[Path]:
    """The files of a checkpoint, but for its seal."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (SEAL, f".{SEAL}"))


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until the disk has it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
