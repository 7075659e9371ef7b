"""`TyingCallback`: checks of the ties during training, measurements of each role, and changes of ties."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    IntervalStrategy,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..config import TyingError, entry_of
from ..diagnostics.diagnosis import diagnose
from ..objectives.own_loss import averages_own_loss, set_accepts_loss_kwargs
from ..parallel.checkpoints import seal_checkpoint
from ..parallel.fsdp_files import SHARDS, form_of
from ..ties.across_ranks import on_any_rank, raised_on_every_rank
from ..ties.anatomy import Anatomy
from ..ties.groups import TieGroup
from ..ties.verify import assert_tied, groups_of, is_split, unwrapped
from .cascade import Cascade
from .roles import ROLES, RoleMeter, measured_roles, scale_input_gradient
from .schedules import check_when, freeze_role, guard, refuse_unheld, step_of, untie_trained

__all__ = ["RoleMeter", "TyingCallback", "assert_optimized", "measured_roles", "set_accepts_loss_kwargs"]

logger = logging.get_logger(__name__)


class TyingCallback(TrainerCallback):
    """Check the ties when training begins and whenever a checkpoint is saved.

    Of several processes, each raises what any of them has lost, with its rank and within the step. For that they send
    one number at each step, and digests of the tied matrices when training begins and before a save. A checkpoint that
    is whole gets a seal (`complete.json`, see `hf_tying.parallel.last_complete_checkpoint`).

    On request, it also measures the roles of tied matrices, unties during training, freezes a role, or scales its
    gradient. A "moment" below is a fraction of all steps (a float above 0, up to 1.0) or a number of steps (an int
    from 1).

    The optimizer is compared with the model (`assert_optimized`), because it may have been made before a `tie` or an
    `untie`. A warning says if `Trainer` multiplies the gradient of the model by the number of processes and of
    accumulation steps (`set_accepts_loss_kwargs`).

    Two faults are not detected. One is a recipe that looks for `lm_head` in `named_parameters()`, which lists a tied
    matrix under its first name only (use `hf_tying.names_of`). The other is an average that has moved a tied matrix
    once for each name in a state dict (use torch's `AveragedModel`, or `hf_tying.training.average_into`).

    Args:
        log_roles: whether each log has the gradient norm of each tied matrix by role. `grad_norm/<group>/<role>` is
            the norm of the part of the gradient that comes through this role (rows that are looked up, or the
            softmax). `grad_share/<group>/<role>` is its share in the sum of these norms. Both are measured on the last
            backward pass before a log. This takes no further matrix product, and the memory of one more matrix for
            each role during the pass. A role is not measured if the loss reads its matrix without calling its module
            (Liger, TRL's fused loss). A warning says so; the role then has no `grad_norm`, and its group no
            `grad_share`. Of shared layers (`share_layers`), each log has `grad_norm/<block>/layer_<i>`,
            `grad_share/...` and `grad_alignment/...`, the cosine of the gradient through this layer to the gradient of
            its block (`hf_tying.training.visits`). That takes the memory of one gradient of the block for each of its
            visits, in the steps with a log. Default `False`.
        untie_at: moment at which the model is untied, as by `untie(model)`, with the optimizer's state copied
            (`untie_trained`). From then on the config says that it is untied. **To resume from a checkpoint made after
            that moment, give Trainer an untied model**: `from_pretrained(checkpoint)`, or any `untie(model)`. Default
            `None`, which is never, as is 1.0.
        freeze: role whose matrix is not trained: `"input"` (all input embeddings), `"source"`, `"target"` or
            `"output"`. If its matrix is tied to that of a trained role, the two are untied when training begins
            (`freeze_role`); to resume, see `untie_at`. The matrix is trainable again when training ends. Default:
            none.
        freeze_until: moment at which the matrix becomes trainable again. It stays untied. Default `None`, which is the
            end of training.
        cascade: train the classifier first (`hf_tying.training.cascade.Cascade`). All layers are trained in the first
            stage. In each later one, one more group of layers is frozen from the head down, and the layers below
            begin again. The value is the number of equal stages, or the share of the steps of each. A tied embedding
            is frozen with the head. Default: none.
        input_gradient_scale: factor of the gradient that comes through the embedding lookup, 0 or more, see
            `scale_input_gradient`. Default `None`, which changes nothing, as does 1.0.
        diagnose_with: untied twin with the same vocabulary. With it, logs also have `effective_rank/<group>`, and
            `alignment/<group>/<role>` and `neighbours/<group>/<role>` of the tied matrix to the twin's matrix of each
            role (`hf_tying.diagnostics`). Default: none.
        diagnose_steps: number of steps; only logs at its multiples have the values of `diagnose_with`. Default: every
            log. Each role of the twin costs about 4 V D^2 multiplications in float64: on a CPU, less than a second for
            10,000 words by 200, and many seconds for 50,000 by 768.

    Raises:
        TyingError: if a value is out of range. When training begins or a checkpoint is saved: if a tie does not hold.
            When training begins: if the optimizer leaves out a matrix or has a tied one twice; if `untie_at`,
            `freeze` or `cascade` is used in several processes, with nothing tied, with a role that the model does not
            have, or with more stages than layers; if a run is resumed after `untie_at` with a tied model.

    Example:
        >>> Trainer(model=model, args=args, train_dataset=data, callbacks=[TyingCallback(log_roles=True)]).train()
        >>> callbacks = [TyingCallback(untie_at=2 / 3)]
    """

    def __init__(
        self,
        log_roles: bool = False,
        *,
        untie_at: float | int | None = None,
        freeze: str | None = None,
        freeze_until: float | int | None = None,
        cascade: int | Sequence[float] | None = None,
        input_gradient_scale: float | None = None,
        diagnose_with: PreTrainedModel | None = None,
        diagnose_steps: int | None = None,
    ) -> None:
        check_when("untie_at", untie_at)
        check_when("freeze_until", freeze_until)
        if freeze is not None and freeze not in ROLES:
            raise TyingError(f"freeze={freeze!r}: expected one of the roles {', '.join(ROLES)}.")
        if freeze_until is not None and freeze is None:
            raise TyingError("freeze_until is given without freeze: say which role, freeze='output' for one.")
        if cascade is not None and (freeze is not None or untie_at is not None):
            raise TyingError("cascade freezes layers by itself: expected neither freeze nor untie_at beside it.")
        number = isinstance(input_gradient_scale, int | float) and not isinstance(input_gradient_scale, bool)
        if input_gradient_scale is not None and not (number and 0 <= input_gradient_scale < float("inf")):
            raise TyingError(f"input_gradient_scale={input_gradient_scale!r}: expected a number of 0 or more.")
        whole = isinstance(diagnose_steps, int) and not isinstance(diagnose_steps, bool) and diagnose_steps >= 1
        if diagnose_steps is not None and not (whole and diagnose_with is not None):
            raise TyingError(
                f"diagnose_steps={diagnose_steps!r} with diagnose_with={type(diagnose_with).__name__}: expected a "
                "number of steps from 1, and an untied twin."
            )
        self.log_roles, self.untie_at, self.freeze, self.freeze_until = log_roles, untie_at, freeze, freeze_until
        self.cascade = None if cascade is None else Cascade(cascade)
        self.input_gradient_scale = input_gradient_scale
        self.diagnose_with, self.diagnose_steps = diagnose_with, diagnose_steps
        self._meter: RoleMeter | None = None
        self._unseen: list[tuple[str, str]] = []
        self._frozen: list[nn.Parameter] = []
        self._handles: list = []
        self._untie_step: int | None = None
        self._groups: list[TieGroup] = []

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        """Guard the ties of a model that will be untied, before Trainer loads a checkpoint into it."""
        # A stock class would load a checkpoint of the untied model into the tied matrix, the last name over the first.
        if (self.untie_at is not None or self.freeze is not None) and model is not None and args.world_size == 1:
            guard(unwrapped(model))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Check ties and optimizer, and prepare what was asked for."""
        self._let_go()  # left by a run that was interrupted
        assert_tied(model, across_ranks=True)
        if optimizer is not None:
            with raised_on_every_rank():
                assert_optimized(model, optimizer)
        if self.untie_at is not None or self.freeze is not None or self.cascade is not None:
            _refuse_processes(args)
        inner = unwrapped(model)
        _warn_of_multiplied_gradient(args, inner)
        if self.untie_at is not None:
            self._plan_untying(args, state, inner, optimizer)
        if self.freeze is not None and not self._is_past(state, self.freeze_until):
            self._frozen = freeze_role(inner, optimizer, self.freeze)
            until = "to the end" if self.freeze_until is None else f"until freeze_until={self.freeze_until}"
            logger.warning(f"Step {state.global_step}: role {self.freeze} is frozen {until}.")
        if self.cascade is not None:
            self.cascade.begin(inner, state.global_step, state.max_steps)
        if self.diagnose_with is not None:
            diagnose(inner, self.diagnose_with)  # refuses a wrong twin before training
        self._groups = groups_of(inner)
        for group in self._groups:
            logger.info(f"Training with group {group.name!r} as one parameter: {', '.join(group.names)}.")
        if self.log_roles:
            self._meter = RoleMeter(inner)
        if self.input_gradient_scale is not None:
            self._handles = scale_input_gradient(inner, self.input_gradient_scale)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the ties. Untie, or train a frozen role, at its moment; attach the meter before a step with a log."""
        self._check_all_ranks(args, model)
        if self._untie_step is not None and state.global_step >= self._untie_step:
            self._untie_step = None
            # A warning, here and below, because transformers does not show a lower level by default.
            logger.warning(f"Step {state.global_step}: untying (untie_at={self.untie_at}).")
            untie_trained(unwrapped(model), optimizer)
            if self._meter is not None:  # a new one for the groups that are still tied
                self._meter.detach()
                self._meter = RoleMeter(unwrapped(model))
        if self._frozen and self._is_past(state, self.freeze_until):
            logger.warning(f"Step {state.global_step}: role {self.freeze} is trained from now on.")
            self._free()
        if self.cascade is not None:
            self.cascade.move_to(unwrapped(model), optimizer, state.global_step, state.max_steps)
        if self._meter is not None:
            self._meter.attach() if _is_logged(args, state) else self._meter.detach()

    def on_substep_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the ties before the next step of accumulation."""
        self._check_all_ranks(args, model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the ties of all processes before a checkpoint is written."""
        if control.should_save:
            assert_tied(model, across_ranks=True)

    on_epoch_end = on_step_end

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check the ties of a checkpoint that was saved, and seal it."""
        with raised_on_every_rank():
            assert_tied(model)
        # All processes have written their files by now.
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.should_save and folder.is_dir():
            if form_of(folder) == SHARDS and not hasattr(model, "peft_config"):
                # `Trainer` writes nothing beside the shards. With these, they can be merged and read.
                for each in filter(None, (unwrapped(model).config, processing_class)):
                    each.save_pretrained(folder)
            seal_checkpoint(folder, state.global_step, entry_of(unwrapped(model).config))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the measurements to a log of the training loss."""
        if logs is None or "loss" not in logs:
            return
        found = self._measured() if self._meter is not None else {}
        if self.diagnose_with is not None and state.global_step % (self.diagnose_steps or 1) == 0:
            found |= diagnose(model, self.diagnose_with).to_logs()
        logs.update(found)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Undo what is only for the training: hooks and frozen roles."""
        self._let_go()

    def _check_all_ranks(self, args: TrainingArguments, model: PreTrainedModel | None) -> None:
        """Raise on all of several processes what one has lost, or untied alone."""
        if args.world_size > 1 and on_any_rank(is_split(unwrapped(model), self._groups), args.device):
            assert_tied(model, across_ranks=True)
            self._groups = groups_of(unwrapped(model))  # all have untied it

    def _measured(self) -> dict[str, float]:
        """The measurements for the log. A warning names roles that were not measured, once."""
        if (unseen := self._meter.unseen()) and unseen != self._unseen:
            uses = ", ".join(f"{group}/{role}" for group, role in unseen)
            logger.warning(
                f"log_roles: {uses} was not seen in the backward pass: the loss takes the matrix without calling its "
                "module (Liger, TRL's fused loss), or the role is not in use. The log has no grad_norm of it, and no "
                "grad_share of its group."
            )
        self._unseen = unseen
        return self._meter.norms()

    def _plan_untying(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        step = step_of(self.untie_at, state.max_steps)
        tied = bool(groups_of(model))
        if state.global_step > step:
            if tied:
                raise TyingError(
                    f"Resumed at step {state.global_step}, after the untying at step {step}, with a tied model. Give "
                    "Trainer the untied one: from_pretrained(checkpoint), whose config says so, or untie(model)."
                )
            return
        if not tied:
            raise TyingError(
                f"untie_at={self.untie_at}: nothing is tied in {type(model).__name__}. tie(model, ...) before, or "
                "leave it out."
            )
        refuse_unheld(model, optimizer)
        if step >= state.max_steps:
            logger.warning(
                f"untie_at={self.untie_at} is not before the last of {state.max_steps} steps: never untied."
            )
        if args.load_best_model_at_end:
            # The best checkpoint may be tied, and Trainer loads it into the untied model.
            guard(model, save_format="portable")
        self._untie_step = step

    def _is_past(self, state: TrainerState, when: float | int | None) -> bool:
        return when is not None and state.global_step >= step_of(when, state.max_steps)

    def _let_go(self) -> None:
        if self._meter is not None:
            self._meter.detach()
            self._meter = None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._untie_step = None
        self._free()
        if self.cascade is not None:
            self.cascade.end()

    def _free(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []


def _warn_of_multiplied_gradient(args: TrainingArguments, model: PreTrainedModel) -> None:
    times = args.world_size * args.gradient_accumulation_steps
    # With label smoothing, Trainer computes the loss itself.
    if times == 1 or args.label_smoothing_factor or not getattr(model, "accepts_loss_kwargs", True):
        return
    if averages_own_loss(model):
        logger.warning(
            f"{type(model).__name__} gives the mean of its losses, and Trainer takes it for a sum over the items of a "
            f"whole update: its gradient is multiplied by {times} ({args.world_size} processes x "
            f"{args.gradient_accumulation_steps} accumulation steps). Before Trainer is made: "
            "hf_tying.training.set_accepts_loss_kwargs(model). A compute_loss_func is not concerned."
        )


def _refuse_processes(args: TrainingArguments) -> None:
    if args.world_size > 1:
        raise TyingError(
            f"untie_at, freeze and cascade need one process, found {args.world_size}: DistributedDataParallel and "
            "sharding do not know a parameter that is made, or frozen, after the model was wrapped. Do it before "
            "Trainer: untie(model), and requires_grad_(False) on the parameters to freeze."
        )


def _is_logged(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the step that begins may end in a log. With logs by epochs, each step may be the last of its epoch."""
    if args.logging_strategy != IntervalStrategy.STEPS:
        return args.logging_strategy == IntervalStrategy.EPOCH
    step = state.global_step + 1
    return step % max(1, state.logging_steps) == 0 or (step == 1 and args.logging_first_step)


def assert_optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that the optimizer has all trained parameters of the model, and each tied matrix once.

    An optimizer without any parameter of the model is accepted, because it has flattened or sharded copies (DeepSpeed,
    FSDP1), or steps during the backward pass. Otherwise, a parameter with `requires_grad` that is in no parameter
    group is one of these:

    - A tied matrix or an embedding, while the optimizer has most of the trained parameters. This is an error: the
      optimizer was made before `tie` or `untie`, or its parameters were chosen by a name that is not in
      `named_parameters()`.
    - Any other parameter, or a matrix while the optimizer has only a part of the model. This may be intended, so it is
      a warning.

    Args:
        model: model to train, also wrapped.
        optimizer: its optimizer.

    Raises:
        TyingError: if a matrix is left out, or a tied one is stepped twice.
    """
    held = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    if not any(id(p) in held for p in model.parameters()):
        return
    anatomy = Anatomy(unwrapped(model))
    groups = groups_of(anatomy.model)
    for group in groups:
        if held[id(anatomy.slots.get(group.root))] > 1:
            raise TyingError(
                f"The optimizer has the matrix of group {group.name!r} ({', '.join(group.names)}) more than once, and "
                "steps it once for each. Choose parameters from model.named_parameters(), which lists it once; "
                "names_of(model, parameter) gives all of its names."
            )
    named = {id(p): [name] for name, p in model.named_parameters()}  # also prompts, which PEFT keeps beside it
    inside: dict[int, list[str]] = {}
    for name, parameter in anatomy.slots.items():
        inside.setdefault(id(parameter), []).append(name)
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    left_out = [(named | inside)[key] for key in trained if key not in held]
    if not left_out:
        return
    ours = {name for group in groups for name in group.names} | anatomy.role_of.keys()
    matrices = [name for names in left_out for name in names if name in ours]
    told = ", ".join(map("/".join, left_out[:3])) + (", ..." if len(left_out) > 3 else "")
    what = f"The optimizer leaves out {len(left_out)} of {len(trained)} trained parameters: {told}"
    if matrices and len(left_out) < len(trained) / 2:
        raise TyingError(
            f"{what}. {', '.join(matrices)} would never be trained: the optimizer was made before tie() or untie(), "
            "or its parameter groups leave it out. Make the optimizer after tie() and untie(), and set "
            "requires_grad_(False) on parameters that are not to be trained."
        )
    logger.warning(f"{what}. They are not trained. If this is intended, set requires_grad_(False) on them.")
