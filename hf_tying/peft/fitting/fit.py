"""`fit_from_lora`: the tied adapter that is next to an existing LoRA adapter."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path

import torch
from transformers.utils import logging

from ..adapter_folder import read_adapter, write_adapter
from ..config import TiedLoraConfig
from ..sharing import Sharing, sharing_of
from ..tensor_names import PREFIX, in_order, names_in_model, to_file
from .alternating import Factors, Problem, Update
from .plain_lora import updates_of_lora
from .starting import starts

logger = logging.get_logger(__name__)

_SWEEPS_OF_TRIAL = 8


@dataclass
class TiedLoraFit:
    """What came out of a fit.

    Args:
        config: of the tied adapter.
        tensors: of its file.
        error: `||dW - fit|| / ||dW||` over all modules together, Frobenius norms.
        errors: the same of each module.
        parameters: of the tied factors.
        lora_parameters: of the factors of the LoRA adapter.
        iterations: sweeps over all factors; of the part that took the most, where the modules are in several.
    """

    config: TiedLoraConfig
    tensors: dict[str, torch.Tensor] = field(repr=False)
    error: float
    errors: dict[str, float] = field(repr=False)
    parameters: int
    lora_parameters: int
    iterations: int

    def save(self, out: str | os.PathLike) -> Path:
        """Write the adapter to a folder, which `PeftModel.from_pretrained` loads."""
        return write_adapter(self.config, self.tensors, out)


def fit_from_lora(
    path: str | os.PathLike,
    r: int,
    out: str | os.PathLike | None = None,
    variant: str | None = None,
    *,
    subfolder: str | None = None,
    token: str | bool | None = None,
    iterations: int = 300,
    tolerance: float = 1e-6,
    restarts: int = 1,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    **config,
) -> TiedLoraFit:
    """The best Tied-LoRA approximation of a LoRA adapter, to go on from or to store in its place.

    Minimises the sum over the modules of `||dW - alpha / r * diag(v) B diag(u) A||^2`, the squared Frobenius norm, by
    alternating least squares over A, B, u and v (see `alternating`). The error never grows, and an adapter that is the
    export of a tied one of this rank is found again. Else how much is lost depends on the adapter, for layers that
    were trained apart may have little in common: look at `error`, and train on from the fit.

    Args:
        path: folder or Hub id of a LoRA adapter. Its ranks, alphas and scalings may differ among modules.
        r: rank of the tied adapter. Higher than LoRA's makes sense: it is one matrix for many.
        out: folder to write the result to. Default: none; the result has `save`.
        variant: as of `TiedLoraConfig`. Default: TL6, changed by the switches among `config`.
        subfolder: of `path`.
        token: for the Hub.
        iterations: sweeps over all factors, at most.
        tolerance: stop when a sweep takes less than this part off the squared error.
        restarts: random starts to try beside the computed ones.
        dtype: to compute in; float32 where float64 is slow. The result has the dtype of the LoRA adapter.
        device: to compute on.
        config: more for `TiedLoraConfig`: `share_by`, `layer_groups`, `tie_qkv`, ... A factor exists as it says; it is
            fitted also where it will not be trained (`train_A=False`). u and v that are not trained are 1.

    Raises:
        ValueError: the adapter is not plain LoRA of linear layers and embeddings, or r is more than a module has.
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
    tied = TiedLoraConfig(r=r, variant=variant, target_modules=in_order(updates), **(settings | config))
    tied.target_modules = in_order(updates)  # a set has no order in a file
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
    factors = to_file({name: tensor.to("cpu", of_file) for name, tensor in state.items()}, tied)
    result = TiedLoraFit(
        config=tied,
        tensors={PREFIX + name: tensor for name, tensor in factors.items()} | others,
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
    restarts: int = 1,
    rounded: torch.dtype | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, float], int]:
    """The best factors of an adapter for given updates. `config.adapted_modules` is set.

    With `rounded`, the dtype that they will have, the errors are those of the factors in that.

    Returns:
        The factors by their names in a model; the squared error of each module; the sweeps.

    Raises:
        ValueError: r is more than any module has.
    """
    names = {
        module: sharing_of(config, module, update.right.shape[1], len(update.left), kinds[module])
        for module, update in updates.items()
    }
    largest = max(names, key=lambda module: min(names[module].in_features, names[module].out_features))
    size = min(names[largest].in_features, names[largest].out_features)
    if config.r > size:
        raise ValueError(
            f"r={config.r} is more than any adapted module has: the largest, {largest!r}, has rank {size}. Expected r "
            "of at most that."
        )
    config.adapted_modules = {module: asdict(of) for module, of in names.items()}
    parts = len(_separate(names))
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
    names: dict[str, Sharing],
    config: TiedLoraConfig,
    iterations: int,
    tolerance: float,
    restarts: int,
    rounded: torch.dtype | None,
    step: Callable[[int], None],
) -> tuple[Factors, dict[str, float], int]:
    """The best factors that were found, the squared error of each module, and the most sweeps that a part took.

    Modules that share nothing, directly or through others, are problems of their own. The best of several starts is
    gone on with, after a few sweeps of each: the computed one, that without its turn, and `restarts` random turns.

    `step` is called with numbers of sweeps that are done, `iterations` for each problem in all.
    """
    found, errors, most = Factors(), {}, 0
    for modules in _separate(names):
        problem = Problem(
            {module: updates[module] for module in modules}, names, config.r, config.train_u, config.train_v
        )
        best, sweeps = None, 0
        for start in starts(problem, restarts):
            problem.factors = start
            problem.balance()
            trial = problem.run(min(_SWEEPS_OF_TRIAL, iterations), tolerance)
            if best is None or problem.error < best[0]:
                best, sweeps = (problem.error, problem.factors), trial
            if problem.error <= problem.floor:
                break
        problem.factors = best[1]
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


def _separate(names: dict[str, Sharing]) -> list[list[str]]:
    """The modules in groups that share nothing with each other."""
    groups: list[tuple[set, list[str]]] = []
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
