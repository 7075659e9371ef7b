"""The tied factors nearest to given low-rank updates, by alternating least squares.

    minimise  sum_m || L_m R_m - diag(v_m) B_b(m) diag(u_u(m)) A_a(m) ||^2

over all A, B, u and v, where modules that share a factor name the same one. With the others fixed each of them is a
linear least squares problem, whose normal equations are r x r, so that the error never grows. No matrix of the size
of a module is made: with X = L (R A^T), `(out, r)`, and G = A A^T, `(r, r)`, all sums are over these.

In one layer's terms this is the trilinear model (CP, PARAFAC) of the tensor of all layers, with one factor more, v,
that scales each row of each layer. From a random start its alternation is slow and stops at bad places; so the start
is computed, as by Jennrich (Harshman 1970, UCLA Working Papers in Phonetics 16): two layers' rows, as coordinates in
the row space of A, differ by one matrix W^-1 diag(u / u') W whose eigenvectors are the A that is looked for. As v is
unknown, rows are known up to a factor, and the matrix is that of a homography, from its direct linear transform.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..sharing import Sharing

_ELEMENTS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Update:
    """One module's update, `left @ right`: `(out_features, k)` and `(k, in_features)`, any k."""

    left: torch.Tensor
    right: torch.Tensor

    def squared_norm(self) -> torch.Tensor:
        return ((self.left.T @ self.left) * (self.right @ self.right.T)).sum().clamp(min=0)


@dataclass
class Factors:
    """The tied factors of a problem, by their names; `v` by module. No u or no v: they are 1.

    Args:
        A: `(r, in_features)`, of the widest module that uses it; the others use its first columns.
        B: `(out_features, r)`, likewise.
        u: `(r,)`.
        v: `(out_features,)`.
    """

    A: dict[str, torch.Tensor] = field(default_factory=dict)
    B: dict[str, torch.Tensor] = field(default_factory=dict)
    u: dict[str, torch.Tensor] = field(default_factory=dict)
    v: dict[str, torch.Tensor] = field(default_factory=dict)

    def update(self, other: "Factors") -> None:
        for kind in ("A", "B", "u", "v"):
            getattr(self, kind).update(getattr(other, kind))


class Problem:
    """One set of modules that share, and the factors as they are now."""

    def __init__(self, updates: dict[str, Update], names: dict[str, Sharing], r: int, with_u: bool, with_v: bool):
        self.updates, self.r, self.with_u, self.with_v = updates, r, with_u, with_v
        self.names = {module: names[module] for module in updates}
        self.norm = sum(update.squared_norm() for update in updates.values())
        first = next(iter(updates.values())).left
        self.new = first.new_empty  # of the dtype and on the device of all
        self.eps = torch.finfo(first.dtype).eps
        # A relative error of 1e-7, which is none in the dtype of an adapter.
        self.floor = max(self.eps, 1e-14) * float(self.norm)
        self.factors = Factors()
        self.error = float("inf")

    def users(self, kind: str) -> dict[str, list[str]]:
        """By the name of an A, B or u the modules that use it."""
        users: dict[str, list[str]] = {}
        for module, of in self.names.items():
            users.setdefault(getattr(of, kind), []).append(module)
        return users

    def of(self, module: str) -> tuple[torch.Tensor, ...]:
        """A, B, u and v as the module uses them."""
        names, factors, update = self.names[module], self.factors, self.updates[module]
        rows, columns = len(update.left), update.right.shape[1]
        one = self.new(()).fill_(1)
        u = factors.u[names.u] if self.with_u else one.expand(self.r)
        v = factors.v[module] if self.with_v else one.expand(rows)
        return factors.A[names.A][:, :columns], factors.B[names.B][:rows], u, v

    def look(self) -> None:
        """X and G of each module, which hold as long as A is the same."""
        self.X, self.G = {}, {}
        for module, update in self.updates.items():
            a = self.of(module)[0]
            self.X[module] = update.left @ (update.right @ a.T)
            self.G[module] = a @ a.T

    def errors(self) -> dict[str, torch.Tensor]:
        """The squared error of each module."""
        found = {}
        for module, update in self.updates.items():
            a, b, u, v = self.of(module)
            # || left right || by their triangular factors; a difference of squared norms would lose half the digits.
            left = torch.cat([update.left, v[:, None] * b], 1)
            right = torch.cat([update.right, -u[:, None] * a])
            low, high = (torch.linalg.qr(matrix, mode="r").R for matrix in (left, right.T))
            found[module] = ((low @ high.T) ** 2).sum()
        return found

    # The alternation.

    def run(self, sweeps: int, tolerance: float, step: Callable[[int], None] = lambda sweeps: None) -> int:
        """Sweep until it is good for nothing more; how often."""
        self.error = float(sum(self.errors().values()))
        for done in range(sweeps):
            if self.error <= self.floor:
                return done
            kept = Factors(*map(dict, (self.factors.A, self.factors.B, self.factors.u, self.factors.v)))
            self.look()
            self.solve_v()
            self.solve_B()
            self.solve_u()
            self.solve_A()
            before, self.error = self.error, float(sum(self.errors().values()))
            step(1)
            if not self.error <= before:  # there is nothing left but rounding
                self.factors, self.error = kept, before
            if before - self.error <= tolerance * before:
                return done + 1
        return sweeps

    def solve(self, gram: torch.Tensor, right: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """The x of gram x = right that is next to `old`; what the equations leave open stays as it was.

        `(..., r, r)`, `(..., r)`, `(..., r)`. The proximal term makes every system regular, and no error grow.
        """
        size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        near = torch.where(size > 0, 16 * self.eps * size, 1)[..., None]
        gram = gram + torch.diag_embed(near.expand(*near.shape[:-1], self.r))
        return torch.linalg.solve(gram, (right + near * old).unsqueeze(-1)).squeeze(-1)

    def solve_v(self) -> None:
        if not self.with_v:
            return
        for module in self.updates:
            _, b, u, v = self.of(module)
            top = (b * self.X[module]) @ u
            bottom = ((b * u) @ self.G[module] * (b * u)).sum(1)
            near = torch.where(bottom > 0, 16 * self.eps * bottom, 1)
            self.factors.v[module] = (top + near * v) / (bottom + near)

    def solve_B(self) -> None:
        for name, modules in self.users("B").items():
            b = self.factors.B[name]
            weights, grams = b.new_zeros(len(b), len(modules)), b.new_zeros(len(modules), self.r**2)
            right = torch.zeros_like(b)
            for index, module in enumerate(modules):
                _, own, u, v = self.of(module)
                weights[: len(own), index] = v**2
                grams[index] = (torch.outer(u, u) * self.G[module]).flatten()
                right[: len(own)] += v[:, None] * self.X[module] * u
            rows = max(1, _ELEMENTS_AT_ONCE // self.r**2)
            self.factors.B[name] = torch.cat(
                [
                    self.solve((weight @ grams).view(-1, self.r, self.r), part, old)
                    for weight, part, old in zip(weights.split(rows), right.split(rows), b.split(rows), strict=True)
                ]
            )

    def solve_u(self) -> None:
        if not self.with_u:
            return
        for name, modules in self.users("u").items():
            gram, right = self.new(self.r, self.r).zero_(), self.new(self.r).zero_()
            for module in modules:
                _, b, _, v = self.of(module)
                scaled = v[:, None] * b
                gram += (scaled.T @ scaled) * self.G[module]
                right += (scaled * self.X[module]).sum(0)
            self.factors.u[name] = self.solve(gram, right, self.factors.u[name])

    def solve_A(self) -> None:
        for name, modules in self.users("A").items():
            a = self.factors.A[name]
            widths = sorted({self.updates[module].right.shape[1] for module in modules})
            parts = []
            # The columns up to one width have the same modules, and so the same equations.
            for start, end in zip([0, *widths[:-1]], widths, strict=True):
                gram, right = self.new(self.r, self.r).zero_(), self.new(self.r, end - start).zero_()
                for module in modules:
                    update = self.updates[module]
                    if update.right.shape[1] < end:
                        continue
                    _, b, u, v = self.of(module)
                    scaled = v[:, None] * b * u
                    gram += scaled.T @ scaled
                    right += (scaled.T @ update.left) @ update.right[:, start:end]
                parts.append(self.solve_columns(gram, right, a[:, start:end]))
            self.factors.A[name] = torch.cat(parts, 1)

    def solve_columns(self, gram: torch.Tensor, right: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """As `solve`, one system for all columns of `right`."""
        size = gram.diagonal().sum()
        near = torch.where(size > 0, 16 * self.eps * size, 1)
        return torch.linalg.solve(gram + near * torch.eye(self.r).to(gram), right + near * old)

    # How it ends.

    def balance(self) -> None:
        """The same updates by factors of like sizes, from which training goes on: u and v are about 1.

        A row of B and that entry of all v that go with it, and one k of all A, B and u, may be scaled against each
        other.
        """
        factors = self.factors
        if self.with_v:
            for name, modules in self.users("B").items():
                b = factors.B[name]
                squares, count = torch.zeros_like(b[:, 0]), torch.zeros_like(b[:, 0])
                for module in modules:
                    v = factors.v[module]
                    squares[: len(v)] += v**2
                    count[: len(v)] += 1
                size = (squares / count).sqrt()
                size = torch.where(size > 0, size, 1)
                factors.B[name] = b * size[:, None]
                for module in modules:
                    factors.v[module] = factors.v[module] / size[: len(factors.v[module])]
        of_a = sum((a**2).sum(1) for a in factors.A.values()).sqrt()
        of_b = sum((b**2).sum(0) for b in factors.B.values()).sqrt()
        of_u = torch.ones_like(of_a)
        if self.with_u:
            of_u = (sum(u**2 for u in factors.u.values()) / len(factors.u)).sqrt()
        live = (of_a > 0) & (of_b > 0) & (of_u > 0)
        to_a = torch.where(live, (of_u * of_b / of_a).sqrt(), 1)
        to_b = torch.where(live, of_u / to_a, 1)
        factors.A = {name: a * to_a[:, None] for name, a in factors.A.items()}
        factors.B = {name: b * to_b for name, b in factors.B.items()}
        factors.u = {name: u / (to_a * to_b) for name, u in factors.u.items()}

    def round_to(self, dtype: torch.dtype) -> None:
        """The factors as they are in another dtype."""
        for factors in (self.factors.A, self.factors.B, self.factors.u, self.factors.v):
            for name, value in factors.items():
                factors[name] = value.to(dtype).to(value.dtype)
