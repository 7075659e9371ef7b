"""A stage of `run_ulmfit.py`: a folder that is finished, or that goes on from its last checkpoint."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel

from hf_tying import TyingError
from hf_tying.parallel import last_complete_checkpoint
from hf_tying.training import discriminative_parameters, slanted_triangular_schedule
from hf_tying.training.results_file import write_json

RECORD = "stage.json"


class Stage:
    """The folder of a model, with a record of what it is made of.

    Args:
        folder: folder of the finished model; checkpoints are below it.
        settings: all that the model depends on. A folder that was made of something else is refused.

    Raises:
        TyingError: if the folder is of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self.record = None
        if (folder / RECORD).is_file():
            self.record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if self.record is None or not (self.finished or self.last_checkpoint()):  # nothing was made yet
            self._write(finished=False, figures={})
        before = self.record["settings"]
        changed = [name for name in {**before, **self.settings} if before.get(name) != self.settings.get(name)]
        if changed:
            told = ", ".join(f"{name} ({before.get(name)!r}, now {self.settings.get(name)!r})" for name in changed[:3])
            raise TyingError(
                f"{str(folder)!r} was made by other settings: {told}. Give another --output_dir, or remove the folder "
                "and those of the later stages."
            )

    @property
    def finished(self) -> bool:
        """Whether the model is there."""
        return self.record["finished"]

    @property
    def figures(self) -> dict[str, Any]:
        """What was measured when the stage was finished."""
        return self.record["figures"]

    @property
    def checkpoints(self) -> str:
        """The folder that `Trainer` writes its checkpoints to."""
        return str(self.folder / "checkpoints")

    def last_checkpoint(self) -> str | None:
        """The checkpoint to go on from."""
        return last_complete_checkpoint(self.checkpoints) if Path(self.checkpoints).is_dir() else None

    def finish(self, **figures: Any) -> None:
        """Record that the model is there, and remove the checkpoints."""
        self._write(finished=True, figures=figures)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _write(self, **record: Any) -> None:
        self.record = {"settings": self.settings, **record}
        write_json(self.record, self.folder / RECORD)


def digest(*contents: Any) -> str:
    """A short name of texts and settings that changes with them."""
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def optimizers(
    model: PreTrainedModel, args: Any, learning_rate: float, steps: int, discriminative: bool
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """The optimizer and the schedule of a stage: Adam with the paper's moments."""
    factor = 2.6 if discriminative and not args.no_discriminative_rates else 1.0
    groups = discriminative_parameters(model, learning_rate, factor, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.7, 0.99))
    if args.no_slanted_triangular:
        return optimizer, LambdaLR(optimizer, lambda step: 1.0)
    return optimizer, slanted_triangular_schedule(optimizer, max(1, steps))


def trainer_settings(args: Any) -> dict[str, Any]:
    """What the training arguments of all stages have in common."""
    return {
        "max_grad_norm": 1.0,
        "logging_strategy": "epoch",
        "save_steps": args.save_steps,
        "save_total_limit": 1,
        "seed": args.seed,
        "use_cpu": args.use_cpu,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available() and not args.use_cpu,
    }
