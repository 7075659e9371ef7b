"""`FixedPoint`: one block applied until nothing changes, which is a stack of tied layers of unlimited depth.

A deep equilibrium model (Bai, Kolter & Koltun 2019) has the output z of `z = block(z, x)`. The derivative of z comes
from the equation, not from the steps that solved it (section 3.1.2, theorem 1): with J the derivative of the block by
z, the gradient g of the output becomes the u of `u = J^T u + g`, and the block is passed backwards once with u. So the
memory does not grow with the steps.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

#: Steps that Anderson's method looks back on: the number of Walker & Ni 2011, section 5, for maps of this kind.
_MEMORY = 5


class NoFixedPointError(ArithmeticError):
    """The steps ended before the block's output was its input."""


class Solution(NamedTuple):
    """How a search for a fixed point ended.

    Args:
        steps: evaluations of the map.
        residual: largest `|f(z) - z| / |f(z)|` over the rows of the batch.
        converged: whether the residual is within the tolerance.
    """

    steps: int
    residual: float
    converged: bool


class FixedPoint(nn.Module):
    """The fixed point of a block: `fixed_point(x)` is the z with `block(z, x) == z`.

    Parameters of the block and `x` get the gradient of the equation. There is no second derivative: a backward pass
    with `create_graph=True` is refused.

    Args:
        block: module or function that maps `(z, x, ...)` to a tensor of the shape of z. It must be the same map at
            each step: dropout that draws a new mask at each call has no fixed point.
        tol: largest residual `|block(z, x) - z| / |block(z, x)|` (norm over each row of the batch). Default 1e-6; a
            dtype that cannot resolve it is solved to eight times its own precision.
        max_steps: most evaluations of the block in the forward pass, and of its derivative in the backward pass.
            Default 100.
        strict: raise where `max_steps` is not enough. Default `True`. `False` returns the last z, and says so in
            `solution` and `backward_solution`, and once in the log.

    Example:
        >>> cell = nn.Linear(8, 8)
        >>> equilibrium = FixedPoint(lambda z, x: torch.tanh(0.5 * cell(z) + x))
        >>> z = equilibrium(torch.randn(4, 8))
        >>> equilibrium.solution.converged
        True
    """

    def __init__(
        self,
        block: Callable[..., torch.Tensor],
        tol: float = 1e-6,
        max_steps: int = 100,
        strict: bool = True,
    ) -> None:
        super().__init__()
        if not callable(block):
            raise TypeError(f"block is a {type(block).__name__}: expected a module or a function of (z, x).")
        if not 0 < tol < 1:
            raise ValueError(f"tol={tol}: expected a number between 0 and 1.")
        if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps={max_steps!r}: expected a whole number of at least 1.")
        self.block, self.tol, self.max_steps, self.strict = block, tol, max_steps, strict
        #: How the last forward and backward pass ended; `None` before the first one.
        self.solution: Solution | None = None
        self.backward_solution: Solution | None = None

    def forward(self, x: torch.Tensor, *args: Any, z0: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """Solve `z = block(z, x, *args, **kwargs)`.

        Args:
            x: input of the block. Its first dimension counts as the batch, if it has more than one.
            *args: further inputs of the block, with their gradients.
            z0: start of the search. Default `None`: zeros of the shape and dtype of `x`. Give one where z has another
                shape than x.
            **kwargs: further inputs by name.

        Returns:
            z, of the shape of `z0`.

        Raises:
            NoFixedPointError: after `max_steps`, or when z is no longer finite, unless `strict` is off.
            ValueError: the block returns another shape.
        """
        z0 = torch.zeros_like(x) if z0 is None else z0

        def step(z: torch.Tensor) -> torch.Tensor:
            return self.block(z, x, *args, **kwargs)

        with torch.no_grad():
            z, self.solution = self._solved(step, z0.detach(), "The block has")
        if not torch.is_grad_enabled():
            return z
        # One step with autograd, at the solution. Its gradient is replaced by that of the equation.
        inner = z.detach().requires_grad_()
        with torch.enable_grad():
            out = step(inner)
        return _Equation.apply(out, inner, self) if out.requires_grad else out

    def _solved(
        self, function: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, subject: str
    ) -> tuple[torch.Tensor, Solution]:
        z, found = solve(function, start, self.tol, self.max_steps)
        if not found.converged:
            message = (
                f"{subject} no fixed point within {found.steps} steps: the residual is {found.residual:.1e}, expected "
                f"{self.tol:.0e}. Give more `max_steps` or a larger `tol`, or make the block a contraction (a smaller "
                "scale of its weights, spectral normalisation)."
            )
            if self.strict or not torch.isfinite(z).all():
                raise NoFixedPointError(message)
        return z, found

    def extra_repr(self) -> str:
        """Settings for `print(model)`."""
        return f"tol={self.tol}, max_steps={self.max_steps}, strict={self.strict}"


class _Equation(torch.autograd.Function):
    """`out` itself, with the gradient of the equation that it solves."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, inner: torch.Tensor, owner: FixedPoint) -> torch.Tensor:
        ctx.out, ctx.inner, ctx.owner = out, inner, owner
        return out.detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A FixedPoint has no second derivative: expected a backward pass without create_graph=True. Unroll "
                "the block for one: for _ in range(steps): z = block(z, x)."
            )
        (gradient,) = gradients

        def step(u: torch.Tensor) -> torch.Tensor:
            (product,) = torch.autograd.grad(ctx.out, ctx.inner, u, retain_graph=True, allow_unused=True)
            return gradient if product is None else product + gradient

        owner: FixedPoint = ctx.owner
        u, owner.backward_solution = owner._solved(step, gradient, "The derivative of the block has")
        return u, None, None


def solve(
    function: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, tol: float, max_steps: int
) -> tuple[torch.Tensor, Solution]:
    """Search z with `function(z) = z` by Anderson's method (Walker & Ni 2011, equation 2.2).

    Each row of the batch has combinations of its own. They are computed in float64, whatever the dtype of z.

    Args:
        function: the map.
        start: first z; its first dimension counts as the batch, if it has more than one.
        tol: largest residual of a row.
        max_steps: most evaluations of the map.

    Returns:
        The value of the map at the last z, and how the search ended.

    Raises:
        ValueError: the map returns another shape.
    """
    tol = max(tol, 8 * torch.finfo(start.dtype).eps)
    flat = (start.shape[0], -1) if start.ndim > 1 else (1, -1)
    z, previous = start, None
    differences: list[tuple[torch.Tensor, torch.Tensor]] = []  # of the map's values, and of the residuals
    for step in range(1, max_steps + 1):
        value = function(z)
        if value.shape != start.shape:
            raise ValueError(
                f"The block maps a tensor of shape {tuple(start.shape)} to one of shape {tuple(value.shape)}: "
                "expected the same shape. Give `z0` of the shape of the block's output."
            )
        residual = (value - z).reshape(flat).double()
        norm = value.reshape(flat).double().norm(dim=-1)
        worst = (residual.norm(dim=-1) / norm.clamp(min=torch.finfo(start.dtype).eps)).max().item()
        if worst <= tol or not math.isfinite(worst):
            return value, Solution(step, worst, worst <= tol)
        flat_value = value.reshape(flat).double()
        if previous is not None:
            differences.append((flat_value - previous[0], residual - previous[1]))
            differences = differences[-_MEMORY:]
        previous = flat_value, residual
        if differences:
            values, residuals = (torch.stack(each, dim=1) for each in zip(*differences, strict=True))
            gram = residuals @ residuals.mT
            ridge = 1e-10 * gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] + torch.finfo(torch.float64).tiny
            gram = gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            weights = torch.linalg.solve(gram, residuals @ residual[..., None])
            flat_value = flat_value - (values.mT @ weights).squeeze(-1)
        z = flat_value.to(start.dtype).reshape(start.shape)
    return value, Solution(max_steps, worst, False)
