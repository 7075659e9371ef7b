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
    "TyingArguments",
    "TyingCallback",
    "average_into",
    "config_with_overrides",
    "recover_lm_head",
    "set_accepts_loss_kwargs",
]

if TYPE_CHECKING:
    from .arguments import ObjectiveArguments, TyingArguments, config_with_overrides
    from .averaging import average_into
    from .callbacks import TyingCallback, set_accepts_loss_kwargs
    from .carried_state import CarriedStateArguments, CarriedStateTrainer
    from .headless import HeadlessTrainer, recover_lm_head
    from .recipes import RECIPES
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
