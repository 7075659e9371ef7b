"""What a training run will need, in one line and before a weight is made: parameters, what ties save, memory."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import TyingError
from ..ties.slots import find_parameter
from ..ties.verify import groups_of
from .layers import block_names

#: Weights, gradients, and AdamW's two moments.
_COPIES = 4
#: Logits, their log-probabilities, and the gradients of both, in float32.
_LOGITS = 4
#: Tensors of the hidden size that a layer keeps for its backward pass: attention, norms, the sums after them.
_KEPT_HIDDEN = 14
#: The same of the width inside its MLP.
_KEPT_INNER = 4


@dataclass(frozen=True)
class SizeEstimate:
    """Size of a model, and of a training step.

    Args:
        model_type: type of the model, as in its config.
        parameters: number of parameters, each tied one counted once.
        saved: number of parameters that the tie groups save.
        scheme: name of its ties.
        weight_bytes: bytes of all weights.
        training_bytes: bytes of a training step with AdamW, estimated, without what the libraries need themselves. The
            loss is the model's own, which has logits of all tokens, and no activation is computed twice.
    """

    model_type: str
    parameters: int
    saved: int
    scheme: str
    weight_bytes: int
    training_bytes: int

    def __str__(self) -> str:
        saved = f" ({_count(self.saved)} saved)" if self.saved else ""
        need = max(self.training_bytes / 1e9, 0.1)
        size = f"{self.model_type}: {_count(self.parameters)} parameters"
        return f"{size}, {self.scheme}{saved}, about {need:.1f} GB to train"

    def refuse_beyond(self, available: int) -> None:
        """Raise `TyingError` if the weights alone need more than `available` bytes."""
        if self.weight_bytes > available:
            raise TyingError(
                f"{self}: its weights alone are {self.weight_bytes / 1e9:.1f} GB, and {available / 1e9:.1f} GB of "
                "memory are free. Give smaller sizes in --config_overrides: hidden_size, num_hidden_layers."
            )


def without_values(
    models: Mapping[type[PreTrainedConfig], type[PreTrainedModel]], config: PreTrainedConfig
) -> PreTrainedModel:
    """The model of a config on the `meta` device. `from_config` would split it over processes under ZeRO-3.

    Args:
        models: classes by their config's, such as `transformers.MODEL_FOR_CAUSAL_LM_MAPPING`.
        config: config of one of them; it is left as it is.
    """
    found: Any = models[type(config)]
    with torch.device("meta"):
        model: PreTrainedModel = (found[0] if isinstance(found, tuple) else found)(copy.deepcopy(config))
    return model if config.dtype is None else model.to(config.dtype)


def estimate_size(model: PreTrainedModel, sequences: int, tokens: int) -> SizeEstimate:
    """Estimate what a training step of `model` needs.

    Args:
        model: model, also on the `meta` device, where it has no values.
        sequences: number of sequences in a batch of one device.
        tokens: number of tokens in a sequence.
    """
    groups = groups_of(model)
    saved = sum((len(group.names) - 1) * find_parameter(model, group.root).numel() for group in groups)
    weight_bytes = model.get_memory_footprint(return_buffers=False)
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    size = next(model.parameters()).element_size()
    width = getattr(config, "hidden_size", None) or 0
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layers = len(list(block_names(model.base_model))) or 1
    kept = size * layers * (_KEPT_HIDDEN * width + _KEPT_INNER * inner)
    by_token = _LOGITS * 4 * (getattr(config, "vocab_size", None) or 0) + kept
    return SizeEstimate(
        model_type=model.config.model_type,
        parameters=model.num_parameters(),
        saved=saved,
        scheme=_scheme(model, bool(groups)),
        weight_bytes=weight_bytes,
        training_bytes=_COPIES * weight_bytes + sequences * tokens * by_token,
    )


def _scheme(model: PreTrainedModel, tied: bool) -> str:
    declared = getattr(model.config, "tying", None) or {}
    name = declared.get("scheme") if isinstance(declared, dict) else None
    return name if name and name != "none" else "tied" if tied else "untied"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
