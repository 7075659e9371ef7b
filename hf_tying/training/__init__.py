"""Tools for training beside `Trainer`: flags that declare ties and objectives, the callback, the papers' trainers."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {
    "CarriedStateArguments": "carried_state",
    "CarriedStateTrainer": "carried_state",
    "HeadlessTrainer": "headless",
    "ObjectiveArguments": "arguments",
    "RECIPES": "recipes",
    "ScriptParser": "command_line",
    "TyingArguments": "arguments",
    "TyingCallback": "callbacks",
    "average_into": "averaging",
    "config_with_overrides": "model_config",
    "recover_lm_head": "headless",
    "resume_path": "resuming",
    "set_accepts_loss_kwargs": "callbacks",
}

__all__ = [
    "CarriedStateArguments",
    "CarriedStateTrainer",
    "HeadlessTrainer",
    "ObjectiveArguments",
    "RECIPES",
    "ScriptParser",
    "TyingArguments",
    "TyingCallback",
    "average_into",
    "config_with_overrides",
    "recover_lm_head",
    "resume_path",
    "set_accepts_loss_kwargs",
]

if TYPE_CHECKING:
    from .arguments import ObjectiveArguments, TyingArguments
    from .averaging import average_into
    from .callbacks import TyingCallback, set_accepts_loss_kwargs
    from .carried_state import CarriedStateArguments, CarriedStateTrainer
    from .command_line import ScriptParser
    from .headless import HeadlessTrainer, recover_lm_head
    from .model_config import config_with_overrides
    from .recipes import RECIPES
    from .resuming import resume_path
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
