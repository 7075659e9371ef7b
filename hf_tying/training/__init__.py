"""What training needs beside `Trainer`: flags that declare ties and objectives, the callback, the papers' trainers."""

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

__all__ = [*_HOME]

__getattr__, __dir__ = lazy_names(globals(), _HOME)
