"""What a training run will need, in one line and before a weight is made: parameters, what ties save, memory."""

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from ..config import TyingError
from ..ties.slots import find_parameter
from ..ties.verify import groups_of

#: Weights, gradients, and AdamW's two moments.
_COPIES = 4
#: Logits and their gradient.
_LOGITS = 2
#: Tensors of the hidden size that a layer keeps for its backward pass: attention, MLP and norms, of usual widths.
_KEPT_BY_LAYER = 16


@dataclass(frozen=True)
class SizeEstimate:
    """How big a model is.

    Args:
        model_type: of its config.
        parameters: each tied one counted once.
        saved: parameters that the tie groups save.
        scheme: its ties by name.
        weight_bytes: of all weights.
        training_bytes: of a training step with AdamW, roughly; it leaves out what the libraries take for themselves.
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


def estimate_size(model: PreTrainedModel, sequences: int, tokens: int) -> SizeEstimate:
    """Estimate what a training step of `model` needs.

    Args:
        model: may stand on the `meta` device, where it has no values.
        sequences: in a batch of one device.
        tokens: in a sequence.
    """
    groups = groups_of(model)
    saved = sum((len(group.names) - 1) * find_parameter(model, group.root).numel() for group in groups)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    size = next(model.parameters()).element_size()
    layers = getattr(config, "num_hidden_layers", None) or 1
    width = getattr(config, "hidden_size", None) or 0
    by_token = _LOGITS * 4 * (getattr(config, "vocab_size", None) or 0) + _KEPT_BY_LAYER * size * layers * width
    return SizeEstimate(
        model_type=model.config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
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
