"""The tied factors nearest to given low-rank updates, by alternating least squares.

    minimise  sum_m || L_m R_m - diag(v_m) B_b(m) diag(u_u(m)) A_a(m) ||^2

over all A, B, u and v, where modules that share a factor name the same one. With the other factors fixed, each factor
is the solution of a linear least squares problem with r x r normal equations, so the error never grows. No matrix of
the size of a module is computed: all sums are over X = L (R A^T), `(out, r)`, and G = A A^T, `(r, r)`.

For one kind of module, this is the trilinear model (CP, PARAFAC) of the tensor of all layers, with a further factor v
that scales each row of each layer. From a random start, the alternation is slow and stops in poor local minima. So the
start is computed, by the method of Jennrich (Harshman 1970, UCLA Working Papers in Phonetics 16). The rows of two
layers, as coordinates in the row space of A, differ by one matrix W^-1 diag(u / u') W, and its eigenvectors give A.
With an unknown v, rows are known only up to a factor, and the matrix is a homography, which the direct linear
transform finds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..sharing import FactorNames

_ELEMENTS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Update:
    """One module's update as a product `left @ right`.

    Args:
        left: `(out_features, k)`, for any k.
        right: `(k, in_features)`.
    """

    left: torch.Tensor
    right: torch.Tensor

    def squared_norm(self) -> torch.Tensor:
        """The squared Frobenius norm of the product, a tensor of one element."""
        return ((self.left.T @ self.left) * (self.right @ self.right.T)).sum().clamp(min=0)


@dataclass
class Factors:
    """The tied factors of a problem. A missing u or v is 1.

    Args:
        A: by name, `(r, in_features)` of the widest module that uses it. The others use its first columns.
        B: by name, `(out_features, r)` of the largest module that uses it. The others use its first rows.
        u: by name, `(r,)`.
        v: by module, `(out_features,)`.
    """

    A: dict[str, torch.Tensor] = field(default_factory=dict)
    B: dict[str, torch.Tensor] = field(default_factory=dict)
    u: dict[str, torch.Tensor] = field(default_factory=dict)
    v: dict[str, torch.Tensor] = field(default_factory=dict)

    def update(self, other: "Factors") -> None:
        """Take over the factors of `other`, by their names."""
        for kind in ("A", "B", "u", "v"):
            getattr(self, kind).update(getattr(other, kind))


class Problem:
    """One set of modules that share factors: their updates, and the present values of the factors.

    Args:
        updates: the update of each module.
        names: names of the factors of each module; other modules may be in it.
        r: rank of the tied factors.
        with_u: whether there is a u. Without one, it is 1.
        with_v: whether there is a v. Without one, it is 1.
    """

    def __init__(
        self, updates: dict[str, Update], names: dict[str, FactorNames], r: int, with_u: bool, with_v: bool
    ) -> None:
        self.updates, self.r, self.with_u, self.with_v = updates, r, with_u, with_v
        self.names = {module: names[module] for module in updates}
        self.norm = sum(update.squared_norm() for update in updates.values())
        first = next(iter(updates.values())).left
        self.new = first.new_empty  # has the dtype and the device of all tensors here
        self.eps = torch.finfo(first.dtype).eps
        # A relative error of 1e-7 is zero in the dtype of an adapter.
        self.floor = max(self.eps, 1e-14) * float(self.norm)
        self.factors = Factors()
        self.error = float("inf")

    def users(self, kind: str) -> dict[str, list[str]]:
        """The modules that use each A, B or u, by the factor's name."""
        users: dict[str, list[str]] = {}
        for module, of in self.names.items():
            users.setdefault(getattr(of, kind), []).append(module)
        return users

    def factors_of(self, module: str) -> tuple[torch.Tensor, ...]:
        """A, B, u and v in the sizes that the module uses."""
        names, factors, update = self.names[module], self.factors, self.updates[module]
        rows, columns = len(update.left), update.right.shape[1]
        one = self.new(()).fill_(1)
        u = factors.u[names.u] if self.with_u else one.expand(self.r)
        v = factors.v[module] if self.with_v else one.expand(rows)
        return factors.A[names.A][:, :columns], factors.B[names.B][:rows], u, v

    def refresh_products(self) -> None:
        """Compute X and G of each module. They are valid until A changes."""
        self.X, self.G = {}, {}
        for module, update in self.updates.items():
            a = self.factors_of(module)[0]
            self.X[module] = update.left @ (update.right @ a.T)
            self.G[module] = a @ a.T

    def errors(self) -> dict[str, torch.Tensor]:
        """The squared error of each module."""
        found = {}
        for module, update in self.updates.items():
            a, b, u, v = self.factors_of(module)
            # || left right || from their triangular factors. A difference of squared norms would lose half the digits.
            left = torch.cat([update.left, v[:, None] * b], 1)
            right = torch.cat([update.right, -u[:, None] * a])
            low, high = (torch.linalg.qr(matrix, mode="r").R for matrix in (left, right.T))
            found[module] = ((low @ high.T) ** 2).sum()
        return found

    # The alternation.

    def run(self, sweeps: int, tolerance: float, step: Callable[[int], None] = lambda sweeps: None) -> int:
        """Alternate until the error stops improving. Returns the number of sweeps.

        Args:
            sweeps: the most sweeps.
            tolerance: stop when a sweep reduces the squared error by less than this fraction of it.
            step: called with 1 after each sweep.
        """
        self.error = float(sum(self.errors().values()))
        for done in range(sweeps):
            if self.error <= self.floor:
                return done
            kept = Factors(*map(dict, (self.factors.A, self.factors.B, self.factors.u, self.factors.v)))
            self.refresh_products()
            self.solve_v()
            self.solve_B()
            self.solve_u()
            self.solve_A()
            before, self.error = self.error, float(sum(self.errors().values()))
            step(1)
            if not self.error <= before:  # only rounding errors are left
                self.factors, self.error = kept, before
            if before - self.error <= tolerance * before:
                return done + 1
        return sweeps

    def solve(self, gram: torch.Tensor, right: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """The solution of gram x = right that is nearest to `old`: what the equations leave open stays as it was.

        The proximal term makes every system regular and lets no error grow.

        Args:
            gram: `(..., r, r)`.
            right: `(..., r)`.
            old: `(..., r)`.
        """
        size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        near = torch.where(size > 0, 16 * self.eps * size, 1)[..., None]
        gram = gram + torch.diag_embed(near.expand(*near.shape[:-1], self.r))
        return torch.linalg.solve(gram, (right + near * old).unsqueeze(-1)).squeeze(-1)

    def solve_v(self) -> None:
        """Set each v to the best one beside the other factors; nothing without a v."""
        if not self.with_v:
            return
        for module in self.updates:
            _, b, u, v = self.factors_of(module)
            top = (b * self.X[module]) @ u
            bottom = ((b * u) @ self.G[module] * (b * u)).sum(1)
            near = torch.where(bottom > 0, 16 * self.eps * bottom, 1)
            self.factors.v[module] = (top + near * v) / (bottom + near)

    def solve_B(self) -> None:
        """Set each B to the best one beside the other factors."""
        for name, modules in self.users("B").items():
            b = self.factors.B[name]
            weights, grams = b.new_zeros(len(b), len(modules)), b.new_zeros(len(modules), self.r**2)
            right = torch.zeros_like(b)
            for index, module in enumerate(modules):
                _, own, u, v = self.factors_of(module)
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
        """Set each u to the best one beside the other factors; nothing without a u."""
        if not self.with_u:
            return
        for name, modules in self.users("u").items():
            gram, right = self.new(self.r, self.r).zero_(), self.new(self.r).zero_()
            for module in modules:
                _, b, _, v = self.factors_of(module)
                scaled = v[:, None] * b
                gram += (scaled.T @ scaled) * self.G[module]
                right += (scaled * self.X[module]).sum(0)
            self.factors.u[name] = self.solve(gram, right, self.factors.u[name])

    def solve_A(self) -> None:
        """Set each A to the best one beside the other factors."""
        for name, modules in self.users("A").items():
            a = self.factors.A[name]
            widths = sorted({self.updates[module].right.shape[1] for module in modules})
            parts = []
            # Columns between two widths belong to the same modules, and so have the same equations.
            for start, end in zip([0, *widths[:-1]], widths, strict=True):
                gram, right = self.new(self.r, self.r).zero_(), self.new(self.r, end - start).zero_()
                for module in modules:
                    update = self.updates[module]
                    if update.right.shape[1] < end:
                        continue
                    _, b, u, v = self.factors_of(module)
                    scaled = v[:, None] * b * u
                    gram += scaled.T @ scaled
                    right += (scaled.T @ update.left) @ update.right[:, start:end]
                parts.append(self.solve_columns(gram, right, a[:, start:end]))
            self.factors.A[name] = torch.cat(parts, 1)

    def solve_columns(self, gram: torch.Tensor, right: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """Like `solve`, with one system for all columns of `right`."""
        size = gram.diagonal().sum()
        near = torch.where(size > 0, 16 * self.eps * size, 1)
        return torch.linalg.solve(gram + near * torch.eye(self.r).to(gram), right + near * old)

    # The result.

    def balance(self) -> None:
        """Rescale the factors to similar sizes, with u and v about 1, so that training can go on. The updates stay.

        The updates leave two scales free: that of a row of B against the entries of v for that row, and for each k of
        the r that of A against B and u.
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
        """Round the factors to the values that they have in another dtype."""
        for factors in (self.factors.A, self.factors.B, self.factors.u, self.factors.v):
            for name, value in factors.items():
                factors[name] = value.to(dtype).to(value.dtype)
