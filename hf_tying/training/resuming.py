"""What `--resume_from_checkpoint` names."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedModel, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..config import TyingError
from ..ties.tying import untie
from ..ties.verify import groups_of


def resume_path(args: TrainingArguments) -> str | None:
    """The folder to resume from, or `None` for a fresh start.

    Args:
        args: `resume_from_checkpoint` is a checkpoint's folder, or `"last"` (or `true`) for the one of most steps in
            `output_dir`.

    Raises:
        TyingError: for a folder that does not exist or is not a checkpoint of `Trainer`.
    """
    asked = args.resume_from_checkpoint
    if asked is None or asked is False or str(asked).lower() in ("false", "none", ""):
        return None
    if asked is True or str(asked).lower() in ("last", "true"):
        last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        if last is None:
            raise TyingError(
                f"--resume_from_checkpoint {asked}: {args.output_dir!r} has no checkpoint. Leave the flag out to "
                "begin, or give the --output_dir of the run to go on with."
            )
        return last
    if not Path(asked, "trainer_state.json").is_file():
        found = get_last_checkpoint(asked) if Path(asked).is_dir() else None
        hint = f" Its last checkpoint is {found!r}." if found else ""
        raise TyingError(f"--resume_from_checkpoint {asked}: not a checkpoint, no trainer_state.json in it.{hint}")
    return str(asked)


def untie_as_saved(model: PreTrainedModel, checkpoint: str) -> PreTrainedModel:
    """Untie a model that resumes from a checkpoint written after `untie_at`, whose config says that nothing is tied.

    Args:
        model: as it is made for the whole run, tied.
        checkpoint: the folder to resume from.

    Returns:
        The same model.
    """
    saved = AutoConfig.from_pretrained(checkpoint)
    entry = getattr(saved, "tying", None) or {}
    if entry.get("scheme") == "none" and not entry.get("groups") and groups_of(model):
        untie(model)
    return model
