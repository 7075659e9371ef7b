"""Tools for training beside `Trainer`: flags that declare ties and objectives, the callback, the papers' trainers."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {
    "CarriedStateArguments": "carried_state",
    "CarriedStateTrainer": "carried_state",
    "GradualUnfreezing": "ulmfit",
    "HeadlessTrainer": "headless",
    "ObjectiveArguments": "arguments",
    "RECIPES": "recipes",
    "ScriptParser": "command_line",
    "TyingArguments": "arguments",
    "TyingCallback": "callbacks",
    "average_into": "averaging",
    "average_predictions": "ulmfit",
    "config_with_overrides": "model_config",
    "discriminative_parameters": "layers",
    "shared_layer_parameters": "layers",
    "distillation_labels": "ulmfit",
    "fit_temperature": "calibration",
    "layer_groups": "layers",
    "pseudo_labels": "ulmfit",
    "recompute_norm_statistics": "ulmfit",
    "recover_lm_head": "headless",
    "resume_path": "resuming",
    "save_whole_model": "resuming",
    "set_accepts_loss_kwargs": "callbacks",
    "slanted_triangular": "ulmfit",
    "slanted_triangular_schedule": "ulmfit",
    "train_from": "resuming",
}

__all__ = [
    "CarriedStateArguments",
    "CarriedStateTrainer",
    "GradualUnfreezing",
    "HeadlessTrainer",
    "ObjectiveArguments",
    "RECIPES",
    "ScriptParser",
    "TyingArguments",
    "TyingCallback",
    "average_into",
    "average_predictions",
    "config_with_overrides",
    "discriminative_parameters",
    "shared_layer_parameters",
    "distillation_labels",
    "fit_temperature",
    "layer_groups",
    "pseudo_labels",
    "recompute_norm_statistics",
    "recover_lm_head",
    "resume_path",
    "save_whole_model",
    "set_accepts_loss_kwargs",
    "slanted_triangular",
    "slanted_triangular_schedule",
    "train_from",
]

if TYPE_CHECKING:
    from .arguments import ObjectiveArguments, TyingArguments
    from .averaging import average_into
    from .calibration import fit_temperature
    from .callbacks import TyingCallback, set_accepts_loss_kwargs
    from .carried_state import CarriedStateArguments, CarriedStateTrainer
    from .command_line import ScriptParser
    from .headless import HeadlessTrainer, recover_lm_head
    from .layers import discriminative_parameters, layer_groups, shared_layer_parameters
    from .model_config import config_with_overrides
    from .recipes import RECIPES
    from .resuming import resume_path, save_whole_model, train_from
    from .ulmfit import (
        GradualUnfreezing,
        average_predictions,
        distillation_labels,
        pseudo_labels,
        recompute_norm_statistics,
        slanted_triangular,
        slanted_triangular_schedule,
    )
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
