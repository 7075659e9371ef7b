"""Pipeline stages that torch cuts out of a tied model: they may be evaluated, and copies of a matrix are not trained.

`torch.distributed.pipelining.pipeline` gives every stage that uses a tied matrix a parameter of its own, under the
name of each use. Nothing sums their gradients, so an optimizer would make several matrices of it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import torch

from ..config import TyingError

if TYPE_CHECKING:
    from torch.distributed.pipelining import Pipe


def watch_copies(wrapped: Callable[..., "Pipe"], args: tuple, kwargs: dict) -> "Pipe":
    """Around `Pipe.from_tracing`: a gradient of a copy of a tied matrix raises a `TyingError`."""
    module = kwargs["mod"] if "mod" in kwargs else args[0]
    pipe = wrapped(*args, **kwargs)
    held = [p for stage in pipe.split_gm.children() for p in stage.named_parameters(remove_duplicate=False)]
    for path, model in module.named_modules():
        for group in vars(model).get("tie_groups", ()):
            names = {f"{path}.{name}".removeprefix(".") for name in group.names}
            copies = {id(parameter): parameter for name, parameter in held if name in names}
            for copy in copies.values():
                if len(copies) > 1 and copy.requires_grad:
                    copy.register_hook(_refusal(type(model).__name__, group.name, group.names))
    return pipe


def _refusal(model: str, group: str, names: tuple[str, ...]) -> Callable[[torch.Tensor], NoReturn]:
    def refuse(gradient: torch.Tensor) -> NoReturn:
        raise TyingError(
            f"Cannot train {model} in pipeline stages: each use of group {group!r} ({', '.join(names)}) has a copy, "
            "and nothing sums their gradients. Train it by DDP, FSDP2, ZeRO or tensor parallelism, or evaluate it."
        )

    return refuse
