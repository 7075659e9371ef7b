"""The factors from which `alternating` starts, computed so that they are exact for updates of a tied adapter.

Every A starts as a basis of the row space of its modules' updates. A turn, `(r, r)`, takes this basis to the basis in
which u is diagonal.
"""

from collections.abc import Iterator
from itertools import combinations

import torch

from .alternating import Factors, Problem, Update

#: Pairs of modules, by name.
Pairs = list[tuple[str, str]]
#: Number of pairs of layers from which a turn of A is computed. Each gives a start.
_PAIRS = 3
#: At larger ranks, the equations of the turn, r^2 x r^2, would take more time than the alternation.
_LARGEST_RANK = 32
#: A turn beyond this condition number is not used: the updates span fewer than r directions.
_LARGEST_CONDITION = 1e6


def starting_factors(problem: Problem, restarts: int) -> Iterator[Factors]:
    """Starts for the alternation, the best first: factors that are exact for updates of a tied adapter, then others.

    Args:
        problem: gives the updates, the names and the rank; its factors are not used.
        restarts: number of further starts with a random u and random turns of A.
    """
    base = {name: _row_space(problem, modules) for name, modules in problem.users("A").items()}
    matching = {name: _matching(problem, name) for name in base}
    turned = problem.with_u and any(matching.values())
    if (turned or len(base) > 1) and (problem.r <= _LARGEST_RANK or not (turned or problem.with_v)):
        for attempt in range(_PAIRS if turned else 1):
            yield _complete(problem, _turned(problem, base, matching if turned else {}, attempt))
    yield _complete(problem, base)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(base[next(iter(base))])

    for _ in range(restarts if turned else 0):
        of_a = {name: draw(problem.r, problem.r) @ a for name, a in base.items()}
        yield _complete(problem, of_a, {name: draw(problem.r) for name in problem.users("u")})


def _turned(
    problem: Problem, base: dict[str, torch.Tensor], matching: dict[str, list[Pairs]], attempt: int
) -> dict[str, torch.Tensor]:
    """Each A turned to the basis in which u is diagonal.

    An A whose modules share a B with the modules of a turned A is turned to agree with that one instead.
    """
    done: dict[str, torch.Tensor] = {}
    waiting = sorted(base, key=lambda name: -len(matching.get(name, ())))
    while waiting:
        found = next((f for name in waiting if (f := _common(problem, name, done))), None)
        name = found[0] if found else waiting[0]
        turn = None
        if found:
            pairs = [
                (_coordinates(problem, module, base[name]), _coordinates(problem, other, done[problem.names[other].A]))
                for module, other in found[1]
            ]
            turn = _map(problem, pairs)
        elif matching.get(name):
            pairs = matching[name][attempt * (len(matching[name]) - 1) // max(1, _PAIRS - 1)]
            turn = _turn(problem, base[name], pairs)
        if turn is None or torch.linalg.cond(turn) > _LARGEST_CONDITION:
            turn = torch.eye(problem.r).to(base[name])
        done[name] = turn @ base[name]
        waiting.remove(name)
    return done


def _common(problem: Problem, name: str, done: dict[str, torch.Tensor]) -> tuple[str, Pairs] | None:
    """The largest list of pairs of modules that share a B, where the first has this A and the second a turned A.

    In one list, all first modules have the same u, and all second modules have the same u and A.

    Returns:
        `name` and the list; `None` if there is no such pair.
    """
    found: dict[tuple[str, str, str], Pairs] = {}
    for module in problem.users("A")[name]:
        of = problem.names[module]
        for other in problem.users("B")[of.B]:
            if problem.names[other].A in done:
                found.setdefault((of.u, problem.names[other].u, problem.names[other].A), []).append((module, other))
    return (name, max(found.values(), key=len)) if found else None


def _row_space(problem: Problem, modules: list[str]) -> torch.Tensor:
    """The first r right singular vectors of the modules' updates, stacked, `(r, columns)`.

    They are computed on the columns that all modules have. The further columns of wider modules are then fitted to
    them.
    """
    updates = [problem.updates[module] for module in modules]
    widths = sorted({update.right.shape[1] for update in updates})
    found = _singular_vectors(problem, updates, widths[0])
    for start, end in zip(widths, widths[1:], strict=False):
        gram, right = problem.new(problem.r, problem.r).zero_(), problem.new(problem.r, end - start).zero_()
        for update in (update for update in updates if update.right.shape[1] >= end):
            y = _rows_in(problem, Update(update.left, update.right[:, :start]), found)
            gram += y.T @ y
            right += (y.T @ update.left) @ update.right[:, start:end]
        found = torch.cat([found, problem.solve_columns(gram, right, torch.zeros_like(right))], 1)
    return found


def _singular_vectors(problem: Problem, updates: list[Update], columns: int) -> torch.Tensor:
    rows = []
    for update in updates:
        # A matrix of k rows with the same Gram matrix as left @ right: only the Gram matrix of left matters.
        values, vectors = torch.linalg.eigh(update.left.T @ update.left)
        rows.append((vectors * values.clamp(min=0).sqrt()).T @ update.right[:, :columns])
    _, values, vectors = torch.linalg.svd(torch.cat(rows), full_matrices=False)
    found = vectors[: problem.r]
    live = values[: problem.r] > 8 * problem.eps * values[0] * len(vectors)
    # If the updates span fewer than r directions, the rest are random ones that training can use.
    generator = torch.Generator().manual_seed(0)
    free = torch.randn(problem.r, columns, generator=generator, dtype=torch.float64).to(found) / columns**0.5
    free[: len(found)][live] = found[live]
    return free


def _coordinates(problem: Problem, module: str, a: torch.Tensor) -> torch.Tensor:
    """The rows of a module's update as coordinates in the rows of `a`, `(out_features, r)`."""
    update = problem.updates[module]
    return _rows_in(problem, update, a[:, : update.right.shape[1]])


def _rows_in(problem: Problem, update: Update, a: torch.Tensor) -> torch.Tensor:
    right = a @ update.right.T
    return update.left @ problem.solve_columns(a @ a.T, right, torch.zeros_like(right)).T


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def _matching(problem: Problem, name: str) -> list[Pairs]:
    """Pairs of modules with this A that share a B and have different u; one list for each two u."""
    by_u: dict[str, dict[str, str]] = {}
    for module in problem.users("A")[name]:
        of = problem.names[module]
        by_u.setdefault(of.u, {})[of.B] = module
    found = []
    for first, second in combinations(by_u.values(), 2):
        pairs = [(first[b], second[b]) for b in first.keys() & second.keys()]
        if pairs:
            found.append(pairs)
    return found


def _turn(problem: Problem, a: torch.Tensor, pairs: Pairs) -> torch.Tensor | None:
    """The turn W, `(r, r)`, such that `W @ a` is A: it has the eigenvectors of W^-1 diag(u / u') W."""
    matrix = _map(problem, [tuple(_coordinates(problem, module, a) for module in pair) for pair in pairs])
    values, vectors = torch.linalg.eig(matrix)
    # Noise makes conjugate pairs of eigenvectors. The real and the imaginary part of one span the plane of the pair.
    vectors = torch.where((values.imag >= 0)[None], vectors.real, vectors.imag)
    try:
        return torch.linalg.inv(vectors)
    except torch.linalg.LinAlgError:
        return None


def _map(problem: Problem, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The M, `(r, r)`, with y = x M for all rows of all pairs (y, x); with an unknown v, up to a factor for each."""
    r = problem.r
    pairs = [(y[: len(x)], x[: len(y)]) for y, x in pairs]
    if not problem.with_v:
        y, x = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return torch.linalg.lstsq(x, y, driver="gelsd" if x.device.type == "cpu" else None).solution
    # Minimise the part of x M that is orthogonal to y.
    equations = problem.new(r * r, r * r).zero_()
    for y, x in pairs:
        y, x = _unit(y), _unit(x)
        products = (x[:, :, None] * y[:, None, :]).reshape(len(y), -1)
        equations += torch.kron(x.T @ x, torch.eye(r).to(x)) - products.T @ products
    return torch.linalg.eigh(equations)[1][:, 0].view(r, r)


def _complete(problem: Problem, of_a: dict[str, torch.Tensor], of_u: dict[str, torch.Tensor] | None = None) -> Factors:
    """All factors from A: u first, unless it is given, then the B and v that fit best."""
    factors = Factors(A=of_a)
    coordinates = {module: _coordinates(problem, module, of_a[names.A]) for module, names in problem.names.items()}
    if problem.with_u:
        factors.u = of_u or _first_u(problem, coordinates)
    for name, modules in problem.users("B").items():
        rows = max(len(coordinates[module]) for module in modules)
        grams = problem.new(rows, problem.r, problem.r).zero_()
        total = problem.new(rows, problem.r).zero_()
        for module in modules:
            t = _without_u(problem, factors, module, coordinates)
            grams[: len(t)] += t[:, :, None] * t[:, None, :]
            total[: len(t)] += t / len(modules)
        # All rows that use one row of B are multiples of it, so it is their first singular vector.
        factors.B[name] = torch.linalg.eigh(grams)[1][:, :, -1] if problem.with_v else total
        if problem.with_v:
            for module in modules:
                t = _without_u(problem, factors, module, coordinates)
                factors.v[module] = (t * factors.B[name][: len(t)]).sum(1)
    return factors


def _without_u(problem: Problem, factors: Factors, module: str, coordinates: dict[str, torch.Tensor]) -> torch.Tensor:
    t = coordinates[module]
    if not problem.with_u:
        return t
    u = factors.u[problem.names[module].u]
    return t / torch.where(u.abs() > 1e-6, u, 1e-6)


def _first_u(problem: Problem, coordinates: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each u, relative to the first earlier one whose modules share a B with its own; 1 without such a one."""
    found: dict[str, torch.Tensor] = {}
    before: dict[str, str] = {}  # the first module that uses each B, by the B's name
    for name, modules in problem.users("u").items():
        known = [(module, before[b]) for module in modules if (b := problem.names[module].B) in before]
        reference = problem.names[known[0][1]].u if known else None
        pairs = [(coordinates[m], coordinates[other]) for m, other in known if problem.names[other].u == reference]
        found[name] = _ratio(problem, pairs) * found[reference] if pairs else problem.new(problem.r).fill_(1)
        for module in modules:
            before.setdefault(problem.names[module].B, module)
    return found


def _ratio(problem: Problem, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The ratio u / u', from pairs of coordinates y = v b u and x = v' b u'."""
    pairs = [(y[: len(x)], x[: len(y)]) for y, x in pairs]
    if not problem.with_v:
        top, bottom = sum((y * x).sum(0) for y, x in pairs), sum((x * x).sum(0) for _, x in pairs)
        return torch.where(bottom > 0, top / bottom, 1)
    equations = problem.new(problem.r, problem.r).zero_()
    for y, x in pairs:
        y, x = _unit(y), _unit(x)
        # The equations of `_map` for a diagonal matrix.
        equations += torch.diag((x**2).sum(0)) - (x * y).T @ (x * y)
    ratio = torch.linalg.eigh(equations)[1][:, 0] * problem.r**0.5
    return ratio if ratio.sum() >= 0 else -ratio
