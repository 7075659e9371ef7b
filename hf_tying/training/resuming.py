"""The checkpoint that `--resume_from_checkpoint` names."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from ..config import TyingConfig, TyingError
from ..parallel.checkpoints import last_complete_checkpoint, refuse_other_engine, why_incomplete
from ..ties.tying import untie
from ..ties.verify import groups_of


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
    if asked is None or asked is False or str(asked).lower() in ("false", "none", ""):
        return None
    if asked is True or str(asked).lower() in ("last", "true"):
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


def train_from(trainer: Trainer, checkpoint: str | None) -> TrainOutput:
    """Train from a checkpoint to the end of a run, and no step further.

    It is `trainer.train(resume_from_checkpoint=checkpoint)`, also for a run that was killed after its last checkpoint:
    `Trainer` would train one step beyond `max_steps` then.

    Args:
        trainer: trainer of the run.
        checkpoint: folder to resume from. `None`: from the start.

    Returns:
        What `trainer.train` gives.
    """
    # A step without batches is none. A callback comes too late: `Trainer` reads what it asks for after a step only.
    next_batches = trainer.get_batch_samples

    def batches(*args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        finished = trainer.state.global_step >= trainer.state.max_steps
        return ([], None) if finished else next_batches(*args, **kwargs)

    trainer.get_batch_samples = batches
    try:
        return trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.get_batch_samples = next_batches


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
