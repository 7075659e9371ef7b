"""`TyingCallback`: a Trainer that says when a tie breaks, and how much of the gradient each role gives."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import IntervalStrategy, TrainerCallback
from transformers.utils import logging

from ..config import TyingError
from ..groups import roles
from ..parameters import find_parameter, find_slot
from ..verify import assert_tied, groups_of, unwrapped

logger = logging.get_logger(__name__)


class TyingCallback(TrainerCallback):
    """Assert the ties when training begins and whenever a checkpoint is saved.

    Args:
        log_roles: with every log, also the gradient norm of each tied matrix by role: `grad_norm/<group>/<role>` for
            the part that comes through that use (input rows looked up, or the softmax) and
            `grad_share/<group>/<role>`, its share in the sum of these norms. Measured on the last backward pass before
            a log, at no further matrix product; one more matrix of the tied size is alive for each role during that
            pass.

    Raises:
        TyingError: at train begin or at a save, when a tie does not hold, or the optimizer was made before the tie and
            holds matrices that are no longer the model's.

    Example:
        >>> Trainer(model=model, args=args, train_dataset=data, callbacks=[TyingCallback(log_roles=True)]).train()
    """

    def __init__(self, log_roles: bool = False):
        self.log_roles = log_roles
        self._meter: RoleMeter | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        assert_tied(model)
        if optimizer is not None:
            assert_optimized(model, optimizer)
        for group in groups_of(unwrapped(model)):
            logger.info(f"Training with group {group.name!r} as one parameter: {', '.join(group.names)}.")
        if self.log_roles:
            self._meter = RoleMeter(unwrapped(model))

    def on_step_begin(self, args, state, control, **kwargs):
        if self._meter is not None:
            self._meter.attach() if _is_logged(args, state) else self._meter.detach()

    def on_save(self, args, state, control, model=None, **kwargs):
        assert_tied(model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._meter is not None and logs is not None and "loss" in logs:
            norms = self._meter.norms()
            logs.update(norms)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(norms)

    def on_train_end(self, args, state, control, **kwargs):
        if self._meter is not None:
            self._meter.detach()
            self._meter = None


def _is_logged(args, state) -> bool:
    """Whether the step that begins ends in a log; by epochs, any step may be the last one before it."""
    if args.logging_strategy != IntervalStrategy.STEPS:
        return args.logging_strategy == IntervalStrategy.EPOCH
    step = state.global_step + 1
    return step % max(1, state.logging_steps) == 0 or (step == 1 and args.logging_first_step)


def assert_optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer steps every tied matrix that is trained.

    Raises:
        TyingError: when it was made before `tie` or `untie`, and holds parameters that are no longer the model's.
    """
    inner = unwrapped(model)
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = {id(p) for p in model.parameters()}
    if not stepped & own:
        return  # an optimizer over flattened or sharded copies (DeepSpeed, FSDP1): nothing can be said
    for group in groups_of(inner):
        parameter = find_parameter(inner, group.root)
        if parameter is not None and parameter.requires_grad and id(parameter) in own and id(parameter) not in stepped:
            raise TyingError(
                f"The optimizer does not hold the matrix of group {group.name!r} ({', '.join(group.names)}): it was "
                "made before the tie, or its parameter groups leave it out. Make the optimizer after tie() and "
                "untie()."
            )


class RoleMeter:
    """Gradient norm of each use of a tied matrix.

    During a forward pass each use gets a view of the one parameter. Autograd computes the gradient of every use anyway
    before it sums them; on the view it can be seen.

    Args:
        model: a model with declared groups. Only names with a role are measured.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._handles: list = []
        self._norms: dict[tuple[str, str], torch.Tensor] = {}

    def attach(self) -> None:
        """Watch every forward pass until `detach`."""
        if self._handles:
            return
        role_of = {name: role for role, names in roles(self.model).items() for name in names}
        for group in groups_of(self.model):
            for name in group.names:
                module, attribute = find_slot(self.model, name)
                if name in role_of and attribute == "weight":
                    self._watch(module, group.name, role_of[name])

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def norms(self) -> dict[str, float]:
        """`grad_norm/<group>/<role>` (L2) and `grad_share/<group>/<role>` (0 to 1) of the last backward pass."""
        norms = {key: float(value) for key, value in self._norms.items()}
        totals: dict[str, float] = {}
        for (group, _), norm in norms.items():
            totals[group] = totals.get(group, 0.0) + norm
        logs = {f"grad_norm/{group}/{role}": norm for (group, role), norm in norms.items()}
        logs |= {f"grad_share/{g}/{role}": norm / totals[g] if totals[g] else 0.0 for (g, role), norm in norms.items()}
        return logs

    def _watch(self, module: nn.Module, group: str, role: str) -> None:
        key = (group, role)
        parameters: list[nn.Parameter] = []

        def before(module, args):
            parameter = module._parameters.get("weight")
            if torch.is_grad_enabled() and parameter is not None and parameter.requires_grad:
                view = parameter.view_as(parameter)
                view.register_hook(lambda grad: self._norms.__setitem__(key, grad.detach().float().norm()))
                parameters.append(parameter)
                module._parameters["weight"] = view

        def after(module, args, output):
            if parameters:
                module._parameters["weight"] = parameters.pop()

        self._handles += [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after, always_call=True),
        ]


@contextmanager
def measured_roles(model: nn.Module) -> Iterator[RoleMeter]:
    """A `RoleMeter` on `model` for the length of a block, outside Trainer."""
    meter = RoleMeter(unwrapped(model))
    meter.attach()
    try:
        yield meter
    finally:
        meter.detach()
