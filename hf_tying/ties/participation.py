"""Check that what a config declares takes part in training steps: some trainers compute the loss around the model.

TRL's trainers and Liger's kernels take the hidden states of the base model and the softmax matrix, and multiply them
by themselves. A projection between the two, or another loss of the model, is then silently left out.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import TyingError
from .anatomy import roles
from .roles import ask
from .slots import find_slot


class Participation:
    """A hook that raises in the backward pass of a training step in which a declared part was not used.

    The part must be used after the hidden states of the base model are made, and before their gradient is.

    Args:
        what: name of the part in the message, such as `"The projection (PR)"`.
        way_out: last sentence of the message.
    """

    def __init__(self, what: str, way_out: str) -> None:
        self.what, self.way_out, self.times = what, way_out, 0

    def took_part(self) -> None:
        """Note a use of the part."""
        if not torch.compiler.is_compiling():
            self.times += 1

    def watch(self, model: PreTrainedModel) -> None:
        """Watch the training steps of `model`, unless it has no separate module that makes its hidden states."""
        if (base := _makes_hidden_states(model)) is not None:
            base.register_forward_hook(self)

    def unwatch(self, model: PreTrainedModel) -> None:
        """Stop watching the training steps of `model`."""
        for module in model.modules():
            for key in [key for key, hook in module._forward_hooks.items() if hook is self]:
                del module._forward_hooks[key]

    def __call__(self, base: nn.Module, args: tuple, output: object) -> None:
        """The forward hook of the base model."""
        if not base.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        hidden = output[0] if isinstance(output, tuple | dict) else output
        if not isinstance(hidden, torch.Tensor) or not hidden.requires_grad:
            return
        before, caller = self.times, _caller()

        def check(gradient: torch.Tensor) -> None:
            if self.times == before:
                raise TyingError(
                    f"{self.what} took no part in this training step: {caller} computes the loss from the hidden "
                    f"states and the softmax matrix by itself. {self.way_out}"
                )

        hidden.register_hook(check)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Participation":
        return self  # a copy of a head (PEFT's modules_to_save) is used in the place of that head


def _makes_hidden_states(model: PreTrainedModel) -> nn.Module | None:
    """The part of `model` whose output its softmax matrix is multiplied with: the base model, or that of the decoder.

    The head lies outside of it: what a whole language model inside another one (EncoderDecoderModel, BLIP-2) puts out
    is logits.
    """
    output = roles(model).get("output")
    head = None if output is None else find_slot(model, output.name)[0]
    found = model
    while isinstance(found, PreTrainedModel):
        inner = found.base_model if found.base_model is not found else ask(found, "get_decoder")
        if not isinstance(inner, nn.Module) or inner is found:
            return None
        found = inner
        if all(module is not head for module in found.modules()):
            return found
    return None


def _caller() -> str:
    """The module of the code that has called the base model."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] not in ("torch", "accelerate", __name__.partition(".")[0]):
            return name
        frame = frame.f_back
    return "the trainer"


def module_of(forward: Callable[..., Any]) -> str:
    """The module in which a forward was written, whatever it has been wrapped to look like."""
    function = getattr(forward, "__func__", getattr(forward, "func", forward))
    return getattr(function, "__globals__", {}).get("__name__", getattr(function, "__module__", "other code"))
