"""The papers' training of their LSTM language models: keywords of `CarriedStateArguments`, by the names of the sizes.

Sources: Zaremba et al. 2014 section 4 and their released code (also Press & Wolf 2016); Inan et al. 2016 section 5,
with the decay of another implementation; Merity et al. 2017 section 5.
"""

from typing import Any


def _sgd(time_steps: int, epochs: int, decay: float, decay_after: int, clip: float) -> dict[str, Any]:
    return {
        "time_steps": time_steps,
        "per_device_train_batch_size": 20,
        "num_train_epochs": epochs,
        "learning_rate": 1.0,
        "decay": decay,
        "decay_after": decay_after,
        "max_grad_norm": clip,
        "sum_over_time": True,
    }


RECIPES: dict[str, dict[str, Any]] = {
    "zaremba_small": _sgd(20, 13, 0.5, 4, 5.0),
    "zaremba_medium": _sgd(35, 39, 0.8, 6, 5.0),
    "zaremba_large": _sgd(35, 55, 1 / 1.15, 14, 10.0),
    "inan_small": _sgd(35, 39, 0.9, 5, 5.0),
    "inan_medium": _sgd(35, 39, 0.9, 10, 5.0),
    "inan_large": _sgd(35, 75, 0.97, 1, 6.0),
    "awd": {
        "time_steps": 70,
        "per_device_train_batch_size": 80,
        "num_train_epochs": 750,
        "learning_rate": 30.0,
        "decay": 1.0,
        "decay_after": 0,
        "max_grad_norm": 0.25,
        "weight_decay": 1.2e-6,
        "average_after": 5,
        "sum_over_time": False,
    },
}
