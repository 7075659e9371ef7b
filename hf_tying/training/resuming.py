"""The checkpoint that `--resume_from_checkpoint` names."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from ..config import TyingConfig, TyingError
from ..parallel.checkpoints import last_complete_checkpoint, refuse_other_engine, why_incomplete
from ..ties.tying import untie
from ..ties.verify import groups_of
from .continuity import Continuity


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
        refuse_other_engine(last, args)
        return last
    if not Path(asked, "trainer_state.json").is_file():
        found = get_last_checkpoint(asked) if Path(asked).is_dir() else None
        hint = f" Its last checkpoint is {found!r}." if found else ""
        raise TyingError(f"--resume_from_checkpoint {asked}: not a checkpoint, no trainer_state.json in it.{hint}")
    if (why := why_incomplete(asked)) is not None:
        raise TyingError(
            f"--resume_from_checkpoint {asked}: {why} With `last` in its place, the newest complete one is found."
        )
    refuse_other_engine(asked, args)
    return str(asked)


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

    It is `trainer.train(resume_from_checkpoint=checkpoint)`, and a run that was stopped ends as one that never was:

    - A run that was killed after its last checkpoint makes no further step. `Trainer` would train one beyond
      `max_steps`. Its random numbers are those of the checkpoint.
    - Logged losses, `train_loss` and the order of the rows go on (`hf_tying.training.continuity.Continuity`).

    Args:
        trainer: trainer of the run.
        checkpoint: folder to resume from. `None`: from the start.

    Returns:
        What `trainer.train` gives.
    """
    # A step without batches is none. A callback comes too late: `Trainer` reads what it asks for after a step only.
    next_batches, trained = trainer.get_batch_samples, False

    def batches(*args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        nonlocal trained
        if trainer.state.global_step >= trainer.state.max_steps:
            return [], None
        trained = True
        return next_batches(*args, **kwargs)

    trainer.get_batch_samples = batches
    # After the one that decides about saving, before those that show a log.
    trainer.callback_handler.callbacks.insert(1, Continuity(trainer, checkpoint))
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.get_batch_samples = next_batches
        trainer.remove_callback(Continuity)
    if checkpoint is not None and not trained:
        trainer._load_rng_state(checkpoint)
    return result._replace(training_loss=result.metrics["train_loss"])


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
    if not Path(checkpoint, "config.json").is_file():  # of FSDP's shards
        return model
    saved = AutoConfig.from_pretrained(checkpoint)
    if getattr(saved, "tying", None) is None or getattr(model.config, "tying", None) is None:
        return model
    before, now = _tied_names(saved), _tied_names(model.config)
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


def _tied_names(config: Any) -> set[tuple[str, ...]]:
    """The groups that a config declares, and its shared layers as one each."""
    declared = TyingConfig.in_config(config)
    stacks = ((stack["path"], *map(str, stack["order"])) for stack in declared.depth)
    return {*(tuple(sorted(names)) for names in declared.groups.values()), *stacks}


def _listed(groups: set[tuple[str, ...]]) -> str:
    return "; ".join("a tie of " + ", ".join(names[:4]) for names in sorted(groups)[:3]) or "no tie"
