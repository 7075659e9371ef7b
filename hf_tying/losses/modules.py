"""A loss function as a module."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class LossModule(nn.Module):
    """Base of the losses as modules: the options of a function are given once, its tensors at each call.

    A subclass sets `function`, and in `at_call` those of its keywords that are given at the call. All its other
    keywords are options: arguments of the constructor, by name or by position, with the function's defaults.

    Attributes:
        options (`dict`): each option's value by name.

    Raises:
        TypeError: for an unknown option.
    """

    function: Callable[..., torch.Tensor]
    at_call: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parameters = inspect.signature(cls.function).parameters
        tensors = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        cls._arguments = (*tensors, *cls.at_call)
        cls.__signature__ = inspect.Signature(
            [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for name, p in parameters.items() if name not in cls._arguments]
        )

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        given = type(self).__signature__.bind(*args, **options)
        given.apply_defaults()
        self.options = given.arguments

    def forward(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """Compute the loss. The arguments are the tensors of the function, then those of `at_call`, in that order."""
        if len(arguments) > len(self._arguments):
            raise TypeError(f"Expected at most {len(self._arguments)} arguments, {self._arguments}: got more.")
        given = dict(zip(self._arguments, arguments, strict=False))
        return self.function(**given, **keywords, **self.options)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items() if value is not None)
