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
        break_graph()
        return torch.compiler.disable(function)(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    return run


def break_graph() -> None:
    """Let `torch.compile` begin a new graph here, and say why where one graph is asked for."""
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(
            msg="The loss of hf_tying runs between two graphs: compile without fullgraph=True, export with "
            "strict=False, or in evaluation mode."
        )
