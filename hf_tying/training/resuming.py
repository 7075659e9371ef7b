"""The checkpoint that `--resume_from_checkpoint` names."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from transformers.utils import logging

from ..config import TyingConfig, TyingError, entry_of
from ..parallel.checkpoints import has_optimizer, last_complete_checkpoint, refuse_other_engine, why_incomplete
from ..parallel.fsdp_files import WHOLE, form_of, fsdp_of, set_form
from ..ties.headers import read_json
from ..ties.tying import untie
from ..ties.verify import groups_of

logger = logging.get_logger(__name__)


def resume_path(args: TrainingArguments) -> str | None:
    """Find the folder to resume from.

    Args:
        args: arguments whose `resume_from_checkpoint` is the folder of a checkpoint, or `"last"` (or `true`) for the
            newest complete one in `output_dir` (`hf_tying.parallel.last_complete_checkpoint`).

    Returns:
        The folder, or `None` for a fresh start.

    Raises:
        TyingError: if the folder does not exist, is not a checkpoint of `Trainer` or is not complete, or was written
            by another engine (FSDP, DeepSpeed), whose optimizer `Trainer` cannot load.
    """
    asked = args.resume_from_checkpoint
    if _is_no(asked):
        return None
    if _is_last(asked):
        last = last_complete_checkpoint(args.output_dir)
        if last is None:
            raise TyingError(
                f"--resume_from_checkpoint {asked}: {args.output_dir!r} has no complete checkpoint. Leave the flag "
                "out to begin, or give the --output_dir of the run to go on with."
            )
        return _fit_to_resume(last, args)
    if not Path(asked, "trainer_state.json").is_file():
        found = get_last_checkpoint(asked) if Path(asked).is_dir() else None
        hint = f" Its last checkpoint is {found!r}." if found else ""
        raise TyingError(f"--resume_from_checkpoint {asked}: not a checkpoint, no trainer_state.json in it.{hint}")
    if (why := why_incomplete(asked)) is not None:
        raise TyingError(
            f"--resume_from_checkpoint {asked}: {why} With `last` in its place, the newest complete one is found."
        )
    return _fit_to_resume(str(asked), args)


def _fit_to_resume(checkpoint: str, args: TrainingArguments) -> str:
    refuse_other_engine(checkpoint, args)
    if not has_optimizer(checkpoint):
        logger.warning(
            f"{checkpoint} has no optimizer (it was written with save_only_model): its moments and the "
            "schedule of the learning rate begin anew."
        )
    return checkpoint


def go_on_by_oneself(asked: str | bool | None, folder: str | Path) -> None:
    """Check the `--resume_from_checkpoint` of a script of several runs, each of which goes on from its own last one.

    Such a script goes on without the flag too, and `last` says no more than that.

    Args:
        asked: what the flag says.
        folder: where the folders of the runs are.

    Raises:
        TyingError: for the folder of one checkpoint, and for `last` where nothing has begun.
    """
    if _is_no(asked):
        return
    if not _is_last(asked):
        raise TyingError(
            f"--resume_from_checkpoint {asked}: this script has several runs, and each goes on from the last "
            "checkpoint of its own folder. Give `last`, or leave the flag out."
        )
    if not any(Path(folder).glob("*")):
        raise TyingError(
            f"--resume_from_checkpoint {asked}: {str(folder)!r} has nothing to go on with. Leave the flag out to "
            "begin, or give the --output_dir of the run to go on with."
        )


def _is_no(asked: str | bool | None) -> bool:
    return asked is None or asked is False or str(asked).lower() in ("false", "none", "")


def _is_last(asked: str | bool | None) -> bool:
    return asked is True or str(asked).lower() in ("last", "true")


def train_from(trainer: Trainer, checkpoint: str | None) -> TrainOutput:
    """Train from a checkpoint to the end of a run, and no step further.

    It is `trainer.train(resume_from_checkpoint=checkpoint)`, also for a run that was killed after its last checkpoint:
    `Trainer` would train one step beyond `max_steps` then. A checkpoint of FSDP is read in the form that it has, whole
    or in shards, and the run writes in the form of its own config: `Trainer` reads its own form only.

    Args:
        trainer: trainer of the run.
        checkpoint: folder to resume from. `None`: from the start.

    Returns:
        What `trainer.train` gives.

    Raises:
        TyingError: if the form of a checkpoint is to change in a run with `load_best_model_at_end`, which might have
            to load a checkpoint of each form.
    """
    as_written = _AsWritten(trainer, checkpoint)
    # A step without batches is none. A callback comes too late: `Trainer` reads what it asks for after a step only.
    next_batches = trainer.get_batch_samples

    def batches(*args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        finished = trainer.state.global_step >= trainer.state.max_steps
        return ([], None) if finished else next_batches(*args, **kwargs)

    trainer.get_batch_samples = batches
    trainer.add_callback(as_written)
    try:
        return trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        as_written.done()
        trainer.remove_callback(as_written)
        trainer.get_batch_samples = next_batches


class _AsWritten(TrainerCallback):
    """FSDP reads a checkpoint in the form that it has, until the run begins."""

    def __init__(self, trainer: Trainer, checkpoint: str | None) -> None:
        self.done: Callable[[], None] = lambda: None
        fsdp, form = fsdp_of(trainer), form_of(checkpoint) if checkpoint else None
        if fsdp is None or form is None or fsdp.state_dict_type.name == form:
            return
        own = fsdp.state_dict_type.name
        if trainer.args.load_best_model_at_end:
            raise TyingError(
                f"{checkpoint} is of {form}, this run writes {own}, and load_best_model_at_end may have to load one "
                f"of each. Set fsdp_state_dict_type: {form}, or leave load_best_model_at_end out."
            )
        logger.info(f"{checkpoint} is read as {form}; this run writes {own}.")
        self.done = set_form(fsdp, form)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done()


def save_whole_model(trainer: Trainer, folder: str | os.PathLike[str] | None = None) -> None:
    """Save the model of a run as one that `from_pretrained` reads: `trainer.save_model()`.

    Under FSDP with `SHARDED_STATE_DICT`, `trainer.save_model()` alone writes nothing, and says nothing. All processes
    must call this.

    Args:
        trainer: trainer of the run.
        folder: where the model goes. Default `None`: the `output_dir` of the run.
    """
    fsdp = fsdp_of(trainer)
    done = set_form(fsdp, WHOLE) if fsdp is not None else lambda: None
    try:
        trainer.save_model(None if folder is None else str(folder))
    finally:
        done()


def ties_as_saved(model: PreTrainedModel, checkpoint: str, untie_at: float | None = None) -> PreTrainedModel:
    """Refuse to resume with other ties than a checkpoint has, or untie as the run had done by then.

    Args:
        model: model as it is made for the whole run.
        checkpoint: folder to resume from.
        untie_at: moment of the run at which it unties. A checkpoint from after it has a config that ties nothing.

    Returns:
        The same model.

    Raises:
        TyingError: for other ties: the state of the optimizer in the checkpoint has a place for each parameter.
    """
    config = Path(checkpoint, "config.json")
    saved, own = entry_of(read_json(config)) if config.is_file() else None, entry_of(model.config)
    if saved is None or own is None:
        return model
    before, now = _tied_names(saved), _tied_names(own)
    if untie_at is not None and not before and groups_of(model):
        return untie(model)
    if before != now:
        raise TyingError(
            f"{checkpoint} was written with {_listed(before)}, and this run has {_listed(now)}: the state of its "
            "optimizer is for other parameters. Resume with the ties that it has; or go on from its weights alone: "
            f"--model_name_or_path {checkpoint} with this run's ties, another --output_dir, no "
            "--resume_from_checkpoint."
        )
    return model


def vocabulary_as_saved(tokenizer: PreTrainedTokenizerBase, checkpoint: str) -> None:
    """Refuse to resume with other words for the rows of the matrices, as a vocabulary made of another text has them.

    Args:
        tokenizer: tokenizer of the run.
        checkpoint: folder to resume from. Without a tokenizer in it nothing is compared.

    Raises:
        TyingError: if a word of the checkpoint's vocabulary has another id now, or none. More words are fine.
    """
    if not Path(checkpoint, "tokenizer_config.json").is_file():
        return
    saved, now = AutoTokenizer.from_pretrained(checkpoint).get_vocab(), tokenizer.get_vocab()
    if moved := [token for token, id in saved.items() if now.get(token) != id]:
        token = min(moved, key=saved.__getitem__)
        raise TyingError(
            f"{checkpoint} was written with another vocabulary: {len(moved)} of {len(saved)} tokens have another id "
            f"now, such as {token!r}, {saved[token]} there and {now.get(token, 'none')} here. Resume with the text or "
            f"the tokenizer of that run; or train on with its own: --model_name_or_path {checkpoint}, another "
            "--output_dir, no --resume_from_checkpoint."
        )


def _tied_names(entry: dict[str, Any]) -> set[tuple[str, ...]]:
    """The groups that an entry of a config declares, and its shared layers as one each."""
    declared = TyingConfig.from_dict(entry)
    stacks = ((stack["path"], *map(str, stack["order"])) for stack in declared.depth)
    return {*(tuple(sorted(names)) for names in declared.groups.values()), *stacks}


def _listed(groups: set[tuple[str, ...]]) -> str:
    return "; ".join("a tie of " + ", ".join(names[:4]) for names in sorted(groups)[:3]) or "no tie"
