"""Every transformers class with words in it, built tiny on the CPU.

`python -m tests.zoo` prints the table of all classes; `--json PATH` writes it too.
"""

import random
import warnings
from functools import cache

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from .zoo_configs import configs_of, tiny_config, vocabulary_sizes
from .zoo_inputs import inputs  # noqa: F401
from .zoo_use import Uses, used  # noqa: F401


class CannotBuild(RuntimeError):
    """A class of the zoo that has no tiny instance; the message says why."""


@cache
def classes() -> tuple[str, ...]:
    """The names of all public model classes whose config counts words, or that declare tied weights."""
    module_of = transformers._class_to_module
    names = [name for name, module in module_of.items() if ".modeling_" in f".{module}"]
    return tuple(sorted(name for name in names if _has_words(name)))


def _has_words(name: str) -> bool:
    try:
        model_class = getattr(transformers, name)
    except (ImportError, RuntimeError):
        return False
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        return False
    if model_class.__name__ != name or name.lower().endswith("pretrainedmodel") or not model_class.config_class:
        return False
    if model_class._tied_weights_keys:
        return True
    try:
        config = model_class.config_class()
    except Exception:
        return True
    return bool(vocabulary_sizes(config))


def build(name: str, seed: int = 0, **config_changes) -> PreTrainedModel:
    """A tiny model of the class `name`, in eval mode, with random weights of which no two are equal by accident.

    Args:
        name: one of `classes()`.
        seed: seed of the weights.
        config_changes: fields of the config; a dict for a nested config changes fields of it. The flag
            `tie_word_embeddings` goes to the nested configs too.

    Raises:
        CannotBuild: the class has no tiny instance.
    """
    model_class = getattr(transformers, name)
    _seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            flag = config_changes.pop("tie_word_embeddings", None)
            config = tiny_config(model_class.config_class, name, **config_changes)
            for part in configs_of(config) if flag is not None else ():
                part.tie_word_embeddings = flag
        except Exception as error:
            raise CannotBuild(f"{name}: no config: {_line(error)}") from error
        try:
            model = model_class(config)
        except Exception as error:
            raise CannotBuild(f"{name}: no model: {_line(error)}") from error
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > 20_000_000:
        raise CannotBuild(f"{name}: {size:,} parameters")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter, dtype=torch.float32), alpha=0.02)
    return model.float().eval()


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    from .zoo_sweep import main

    main()
