"""`fit_from_lora`: the tied adapter that is nearest to a LoRA adapter."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf, sqrt
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ...report.layer_order import in_layer_order
from ..adapter_folder import read_adapter, write_adapter
from ..config import TiedLoraConfig
from ..sharing import FactorNames, name_factors, refuse_rank
from ..tensor_names import BASE_PREFIX, file_from_state, names_in_model
from .alternating import Factors, Problem, Update
from .plain_lora import updates_of_lora
from .starting import starting_factors

logger = logging.get_logger(__name__)

#: All starts are tried for a few sweeps, the best for some more: numbers of sweeps, and of starts that go on.
_TRIALS = ((8, 4), (32, 1))


@dataclass
class TiedLoraFit:
    """The result of a fit.

    Args:
        config: the settings of the tied adapter.
        tensors: the tensors of its file.
        error: `||dW - fit|| / ||dW||` over all modules together, in Frobenius norms.
        errors: the same for each module.
        parameters: number of elements of the tied factors.
        lora_parameters: number of elements of the LoRA adapter's factors.
        iterations: number of sweeps over all factors. Modules that share nothing are fitted apart; then it is the
            largest number.
    """

    config: TiedLoraConfig
    tensors: dict[str, torch.Tensor] = field(repr=False)
    error: float
    errors: dict[str, float] = field(repr=False)
    parameters: int
    lora_parameters: int
    iterations: int

    def save(self, out: str | os.PathLike) -> Path:
        """Write the adapter to a folder that `PeftModel.from_pretrained` loads."""
        return write_adapter(self.config, self.tensors, out)


def fit_from_lora(
    path: str | os.PathLike[str],
    r: int,
    out: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    *,
    subfolder: str | None = None,
    token: str | bool | None = None,
    iterations: int = 300,
    tolerance: float = 1e-6,
    restarts: int = 16,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    **config: Any,
) -> TiedLoraFit:
    """The Tied-LoRA adapter nearest to a LoRA adapter: a start for further training, or a smaller file.

    The fit minimises the sum over the modules of `||dW - alpha / r * diag(v) B diag(u) A||^2`, the squared Frobenius
    norm, by alternating least squares over A, B, u and v (see `alternating`). The error never grows. A LoRA adapter
    that was exported from a tied adapter of this rank gives that adapter back. For any other, the error depends on how
    much its layers have in common, and may be large: look at `error`, and train the fit further.

    Args:
        path: folder or Hub id of a LoRA adapter. Its ranks, alphas and scalings may differ among modules.
        r: rank of the tied adapter. It may well be higher than LoRA's, because one matrix serves many modules.
        out: folder to write the result to. Default: none; the result has a method `save`.
        variant: as in `TiedLoraConfig`. Default: TL6, changed by the switches in `config`.
        subfolder: the subfolder of `path` that has the adapter. Default: none.
        token: token for the Hub.
        iterations: the most sweeps over all factors. Default 300.
        tolerance: stop when a sweep reduces the squared error by less than this fraction of it. Default 1e-6.
        restarts: number of random starts to try beside the computed ones, where modules of different u share A and B.
            Default 16. Measured on random adapters with v = 1 (2 to 8 layers, r of 2 to 8): 31 of 35 errors are within
            0.1 % of the best of 32 starts that were all run to their end. The others, of 8 layers or of rank 8, are
            up to 0.95 % above it: there one start in sixteen leads to the best.
        dtype: dtype of the computation. Default float64; float32 is for devices on which that is slow. The result has
            the dtype of the LoRA adapter.
        device: device of the computation. Default: the CPU.
        config: further settings for `TiedLoraConfig`: `share_by`, `layer_groups`, `tie_qkv`, ... A and B are fitted
            also if they will not be trained (`train_A=False`). u and v that will not be trained are 1.

    Raises:
        ValueError: the adapter is not plain LoRA of linear layers and embeddings, or no module has the rank r.
    """
    lora, tensors = read_adapter(path, subfolder, **({"token": token} if token is not None else {}))
    place = os.path.join(os.fspath(path), subfolder or "")
    updates, kinds, others = updates_of_lora(lora, tensors, place)
    same = ("fan_in_fan_out", "modules_to_save", "task_type", "base_model_name_or_path", "revision", "auto_mapping")
    settings = {name: getattr(lora, name) for name in same} | {
        "dropout": lora.lora_dropout,
        "bias": "tied_lora_only" if lora.bias == "lora_only" else lora.bias,
        "inference_mode": True,
    }
    tied = TiedLoraConfig(r=r, variant=variant, target_modules=in_layer_order(updates), **(settings | config))
    tied.target_modules = in_layer_order(updates)  # the config makes a set of it, which has no order in a file
    of_file = next(iter(updates.values())).left.dtype
    state, squares, count = fit_updates(
        tied,
        {module: Update(*(part.to(device, dtype) for part in (u.left, u.right))) for module, u in updates.items()},
        kinds,
        iterations=iterations,
        tolerance=tolerance,
        restarts=restarts,
        rounded=of_file,
    )
    norms = {module: float(_double(update).squared_norm()) for module, update in updates.items()}
    factors = file_from_state({name: tensor.to("cpu", of_file) for name, tensor in state.items()}, tied)
    result = TiedLoraFit(
        config=tied,
        tensors={BASE_PREFIX + name: tensor for name, tensor in factors.items()} | others,
        error=_ratio(sum(squares.values()), sum(norms.values())),
        errors={module: _ratio(squares[module], norms[module]) for module in updates},
        parameters=sum(tensor.numel() for tensor in factors.values()),
        lora_parameters=sum(update.left.numel() + update.right.numel() for update in updates.values()),
        iterations=count,
    )
    if out is not None:
        result.save(out)
    return result


def fit_updates(
    config: TiedLoraConfig,
    updates: dict[str, Update],
    kinds: dict[str, str],
    iterations: int = 300,
    tolerance: float = 1e-6,
    restarts: int = 16,
    rounded: torch.dtype | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, float], int]:
    """Fit the factors of an adapter to given updates.

    Args:
        config: the adapter's settings. Its `adapted_modules` is set here.
        updates: the update of each module.
        kinds: "linear" or "embedding" for each module.
        iterations: largest number of sweeps, as in `fit_from_lora`.
        tolerance: relative gain below which the sweeps end, as in `fit_from_lora`.
        restarts: number of random starts, as in `fit_from_lora`.
        rounded: the dtype that the factors will have. With it, the errors are those of the rounded factors.

    Returns:
        The factors by their names in a model; the squared error of each module; the number of sweeps.

    Raises:
        ValueError: no module has the rank r.
    """
    sizes = {module: (kinds[module], update.right.shape[1], len(update.left)) for module, update in updates.items()}
    names = name_factors(config, sizes)
    refuse_rank(config.r, names)
    config.adapted_modules = {module: of.entry for module, of in names.items()}
    parts = len(_independent_modules(names))
    with logging.tqdm(total=parts * iterations, desc="Fitting the tied factors", delay=2) as progress:
        factors, errors, count = _alternate(
            updates, names, config, iterations, tolerance, restarts, rounded, progress.update
        )
    state = {}
    for module, of in names.items():
        for kind, name in names_in_model(config, module).items():
            value = getattr(factors, kind)[module if kind == "v" else getattr(of, kind)]
            state[name] = value / config.scaling if kind == "B" else value
    return state, errors, count


def _alternate(
    updates: dict[str, Update],
    names: dict[str, FactorNames],
    config: TiedLoraConfig,
    iterations: int,
    tolerance: float,
    restarts: int,
    rounded: torch.dtype | None,
    step: Callable[[int], None],
) -> tuple[Factors, dict[str, float], int]:
    """Fit the factors from several starts, and continue from the start that is best after a few sweeps.

    Modules that share nothing, directly or through others, are separate problems.

    Args:
        updates: the update of each module.
        names: names of the factors of each module.
        config: settings of the adapter.
        iterations: largest number of sweeps of a problem.
        tolerance: relative gain below which the sweeps end.
        restarts: number of random starts.
        rounded: dtype that the factors will have, for the errors; `None`: as they are computed.
        step: called with numbers of finished sweeps, which add up to `iterations` for each problem.

    Returns:
        The factors; the squared error of each module; the largest number of sweeps of a problem.
    """
    found, most = Factors(), 0
    errors: dict[str, float] = {}
    for modules in _independent_modules(names):
        problem = Problem(
            {module: updates[module] for module in modules}, names, config.r, config.train_u, config.train_v
        )
        sweeps = _take_best_start(problem, restarts, iterations, tolerance)
        step(sweeps)
        sweeps += problem.run(iterations - sweeps, tolerance, step)
        step(iterations - sweeps)
        problem.balance()
        if rounded is not None:
            problem.round_to(rounded)
        found.update(problem.factors)
        errors |= {module: float(error) for module, error in problem.errors().items()}
        most = max(most, sweeps)
    return found, errors, most


def _take_best_start(problem: Problem, restarts: int, iterations: int, tolerance: float) -> int:
    """Leave the problem at the start that is best after some sweeps. Returns how many it has had."""
    tried: Iterable[tuple[float, int, Factors]]
    tried = ((inf, 0, start) for start in starting_factors(problem, restarts))
    for sweeps, kept in _TRIALS:
        after: list[tuple[float, int, Factors]] = []
        for _, done, start in tried:
            problem.factors = start
            problem.balance()
            done += problem.run(min(sweeps, iterations - done), tolerance)
            if problem.error <= problem.floor:
                return done
            after.append((problem.error, done, problem.factors))
        tried = best = sorted(after, key=lambda trial: trial[0])[:kept]
    _, done, problem.factors = best[0]
    return done


def _independent_modules(names: dict[str, FactorNames]) -> list[list[str]]:
    """The modules in lists that share nothing with each other."""
    groups: list[tuple[set[tuple[str, str]], list[str]]] = []
    for module, of in names.items():
        keys = {("A", of.A), ("B", of.B), ("u", of.u)}
        joined = [module]
        for group in [group for group in groups if group[0] & keys]:
            groups.remove(group)
            keys |= group[0]
            joined = group[1] + joined
        groups.append((keys, joined))
    return [modules for _, modules in groups]


def _double(update: Update) -> Update:
    return Update(update.left.double(), update.right.double())


def _ratio(square: float, norm: float) -> float:
    return sqrt(square / norm) if norm else 0.0
