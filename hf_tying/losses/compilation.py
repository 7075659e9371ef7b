"""Functions that `torch.compile` does not trace."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Params = ParamSpec("Params")
Result = TypeVar("Result")


def untraced(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorator: `torch.compile` runs `function` as it is, with all that it calls, between two graphs.

    That is what `torch.compiler.disable` does. It imports the whole compiler, though, so it is called only where the
    compiler is imported already. Until then nothing can be traced.
    """

    @wraps(function)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        return torch.compiler.disable(function)(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    return run
