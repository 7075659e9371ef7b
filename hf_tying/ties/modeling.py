"""`TiedModelMixin`, which keeps ties through a model's life; `tie` and `untie` change them.

The mixin sits in front of a transformers class and answers transformers' own hooks: `post_init` (declare and tie),
`tie_weights` (after a load, and at every later call), the embedding setters and the resize, `_apply` (`.to()`,
`to_empty()`), `state_dict` and its loading, `save_pretrained`. `tie(model, ...)` puts the same mixin in front of the
class of a live model, so both forms behave alike.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import TyingConfig, TyingError
from .anatomy import Anatomy
from .checkpoint import check_loaded_state, initial_parameter, tie_assigned, tie_loaded, with_all_names
from .classes import MixinBase, mixins_of, with_mixin, without_mixin
from .declared import stock_keys
from .declaring import shared_variant
from .depth_groups import VARIANT, needs_this_package
from .extensions import honour_extensions
from .file_state import file_state
from .groups import TieGroup, resolve, subgroups
from .making import models_being_made, ties_wait, values_wait
from .record import refuse_contradicting_flag, write_config
from .relaxation import Relaxation, resized
from .relaxing import refuse_split, relax_declared
from .resizing import (
    fit_tied,
    follow_bias,
    refuse_new_rows,
    refuse_other_values,
    refuse_relaxed,
    replace_tied,
    resize,
)
from .roles import ask
from .sharding import gathered
from .shared_layers import damp_declared
from .slots import (
    canonical,
    find_parameter,
    find_slot,
    is_one,
    parameter_of,
    same_values,
    share_parameter,
    untie_others,
    unwrap,
)
from .training_checks import refuse_untrainable
from .verify import offloaded, refuse_untied, violations


class TiedModelMixin(MixinBase):
    """Mixin in front of a transformers class: it keeps the ties of `config.tying` through the model's whole life.

    `tie_groups` holds the concrete groups (`TieGroup`: a name, the parameter names, root first). Without a `tying`
    entry the groups are those that the class itself declares under `tie_word_embeddings`.

    Example:
        >>> class TiedLlamaConfig(TyingConfigMixin, LlamaConfig):
        ...     model_type = "tied_llama"
        >>> class TiedLlama(TiedModelMixin, LlamaForCausalLM):
        ...     config_class = TiedLlamaConfig
        >>> model = TiedLlama(TiedLlamaConfig(tying={"version": 1, "scheme": "two_way"}))
        >>> model.lm_head.weight is model.model.embed_tokens.weight
        True

    Raises:
        TyingError: by any of the methods below, instead of a silently broken tie.
    """

    tie_groups: list[TieGroup] = []  # on the instance once `post_init` has run
    _ties_made: bool  # `False` while values that differ are only initialised, and may be overwritten
    _made_in_part: bool  # whether a subclass may still add modules

    # --- a model is made ---------------------------------------------------------------------------------------------

    def post_init(self) -> None:
        """Declare the groups, initialise the weights, tie."""
        self._post_init_tied(super().post_init)

    def _post_init_tied(self, stock_post_init: Callable[[], None]) -> None:
        self._ties_made = False
        config = TyingConfig.in_config(self.config)
        making = models_being_made()
        parts = [model for model in making if model is not self and type(model.config) is type(self.config)]
        strict = not parts and self._is_declared_class()  # a part shares the record of the whole, with its names
        damp_declared(self, config)
        relax_declared(self, config, strict, active=not (ties_wait() or values_wait()))
        refuse_split(self)
        honour_extensions(self, config, strict)
        # A subclass may add modules after `super().__init__()`. Then two `__init__` of this object are running.
        whole = sum(model is self for model in making) < 2
        if not whole:
            self._made_in_part = True
        anatomy = Anatomy(self)
        shared = anatomy.tied  # by the architecture's own `__init__`, and by the models inside
        kept = shared if config.scheme is None else anatomy.without_roles(shared)
        groups = resolve(anatomy, config, strict and whole, also=kept)
        refuse_contradicting_flag(anatomy, config, groups)
        for group in groups:
            initial_parameter(self, group)  # refuses before anything is changed
        untie_others(self, groups)
        self.tie_groups = groups
        declare(self, groups)
        stock_post_init()
        declare(self, groups)  # again, since the stock method has added what the models inside declare
        if strict:
            write_config(self)

    def _is_declared_class(self) -> bool:
        """Whether the names in the config are those of this class, not of a class with a head or with another head.

        A class without a softmax that has saved the record of a language model keeps the names of its head.
        """
        if TyingConfig.in_config(self.config).save_format is not None and self.get_output_embeddings() is None:
            return False
        headless = self.base_model is self and self.get_output_embeddings() is None
        if not isinstance(architectures := getattr(self.config, "architectures", None), list) or not architectures:
            return not (self.base_model_prefix and headless)
        if headless and self.base_model_prefix:  # `head.base_model.save_pretrained` writes the entry of the head
            config = TyingConfig.in_config(self.config)
            names = [name for names in config.groups.values() for name in names]
            names += [stack["path"] for stack in config.depth]
            if any(name.startswith(f"{self.base_model_prefix}.") for name in names):
                return False
        return any(cls.__name__ in architectures for cls in type(self).__mro__)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether `_init_weights` is custom code. A class over a stock one is initialised like the stock one."""
        owner = next(base for base in cls.__mro__ if "_init_weights" in vars(base))
        return not owner.__module__.startswith("transformers.")

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """The root of each tied name, for accelerate, the quantisers and `device_map="auto"`."""
        return {name: group.root for group in self.tie_groups for name in group.aliases}

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True, **kwargs: Any) -> None:
        """Tie the declared groups. Unlike the stock method, it never overwrites trained values that differ.

        Args:
            missing_keys: names that a checkpoint did not have, given by `from_pretrained`. They are filled from any
                name of their group that it had; values that differ are handled as `on_conflict` says.
            recompute_mapping: argument of the stock method, without effect: only `tie` and `untie` change the groups.
            **kwargs: further arguments of the stock method, without effect.

        Raises:
            TyingError: when names of a group hold different values.
        """
        if ties_wait():
            return
        if missing_keys is not None:
            self._resolve_when_whole()
            kept = tie_loaded(self, missing_keys)
            for module in self.modules():
                if isinstance(module, Relaxation):
                    module.active = True
            if kept != self.tie_groups:
                declare(self, kept)
                write_config(self)
        elif self._ties_made:
            self._tie_again()
        else:
            for group in self.tie_groups:
                share_parameter(self, group.names, initial_parameter(self, group))
            for module in self.modules():
                if isinstance(module, Relaxation) and not module.active:
                    module.start()
        self._ties_made = True
        fit_tied(self)

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """As in transformers, which asks for it before a file's values are tied."""
        self._leave_other_stages()
        super().mark_tied_weights_as_initialized(loading_info)

    def _leave_other_stages(self) -> None:
        """Names on another stage of a pipeline are not here to be tied."""
        if hasattr(self, "_pp_stage"):
            here = [[n for n in group.names if find_parameter(self, n) is not None] for group in self.tie_groups]
            pairs = zip(self.tie_groups, here, strict=True)
            declare(self, [TieGroup(group.name, tuple(names)) for group, names in pairs if len(names) > 1])

    def _resolve_when_whole(self) -> None:
        """Resolve the groups again before the values of a file are tied.

        A subclass may have added modules since `post_init`.
        """
        if vars(self).pop("_made_in_part", False):
            config = TyingConfig.in_config(self.config)
            self.tie_groups = resolve(Anatomy(self), config, self._is_declared_class())
            declare(self, self.tie_groups)
        self._leave_other_stages()

    def _tie_again(self) -> None:
        for group in self.tie_groups:
            if is_one(self, group.names) or any(offloaded(self, name) for name in group.names):
                continue
            root, *others = (find_parameter(self, name) for name in group.names)
            with gathered((root, *others)):
                whole = root is not None and all(_is_copy(p, root) for p in others)
            if root is None or not whole:
                problems = "; ".join(violations(self, [group]))
                raise TyingError(f"tie_weights() would overwrite trained values and changes nothing: {problems}")
            share_parameter(self, group.names, root)

    # --- the embeddings change ---------------------------------------------------------------------------------------

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the input embedding; every name tied to it follows, since they are one matrix.

        Raises:
            TyingError: when `value` has no matrix to tie, and where the input embedding is relaxed.
        """
        old = self.get_input_embeddings()
        refuse_relaxed(old, value)
        with resized(self):
            if value is not old and not replace_tied(self, old, value):
                super().set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output embedding. A tied one is replaced by another module over the same values only.

        Raises:
            TyingError: for other values: they would be the input embedding's too, which may be trained.
        """
        old = self.get_output_embeddings()
        if new_embeddings is not old:
            refuse_other_values(self, old, new_embeddings)
        if new_embeddings is not old:
            if not replace_tied(self, old, new_embeddings):
                super().set_output_embeddings(new_embeddings)
            follow_bias(self, new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize as transformers does. Tied names stay one parameter, and untied embeddings are resized in place.

        Raises:
            TyingError: when the ties are already broken, or an engine of DeepSpeed ZeRO-3 has taken the model.
        """
        refuse_untied(self, "resize")
        refuse_new_rows(self, new_num_tokens, pad_to_multiple_of)
        with resized(self):
            return resize(self, super().resize_token_embeddings, new_num_tokens, pad_to_multiple_of, mean_resizing)

    # --- tensors move and are replaced -------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Keep ties in `.to()`, `.half()` and `to_empty()`, where torch may make a tensor for each name."""
        held = [group for group in self.tie_groups if is_one(self, group.names)]
        result = super()._apply(fn, recurse)
        for group in held:
            share_parameter(self, group.names, parameter_of(self, group.root))
        return result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass. In training, a broken tie raises: the matrices would drift apart unseen.

        So do the copies of a matrix on the stages of a pipeline.
        """
        if self.training and not torch.compiler.is_compiling() and not getattr(self, "_is_replica", False):
            refuse_untrainable(self)
        return super().__call__(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, and honour the extensions of its config, which older pickles do not have."""
        super().__setstate__(state)
        honour_extensions(self, TyingConfig.in_config(self.config), strict=False)

    # --- state dicts -------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as torch does. A strict load needs one name of each group, since the others are the same matrix.

        Raises:
            TyingError: when the state dict has different values for names of one group; nothing is loaded.
        """
        if strict:
            state_dict = with_all_names(self, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check that the names of each group agree before torch loads this module, alone or inside another one."""
        names = check_loaded_state(self, state_dict, prefix)
        if local_metadata.get("assign_to_params_buffers", False):
            vars(self)["_assigned_names"] = names  # made one again by `tie_assigned`, once all modules are loaded
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    # --- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, also a file that other loaders would misread: they do not look for its name."""
        try:
            return super().from_pretrained(*args, **kwargs)
        except OSError:
            if (variant := shared_variant(args, kwargs)) is None:
                raise
        return super().from_pretrained(*args, **kwargs, variant=variant)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Save as transformers does, after the ties are checked and `config.tying` is written from them.

        Raises:
            TyingError: when a tie is broken, or weights are offloaded; nothing is written.
        """
        adapters_only = getattr(self, "_hf_peft_config_loaded", False)
        refuse_untied(self, "save")
        entry = getattr(self.config, "tying", None)
        config = write_config(self)
        try:
            if not adapters_only:
                state_dict = file_state(self, state_dict, config.save_format, is_main_process)
                # A training goes on from its checkpoints in the same program, which looks for the usual name.
                if needs_this_package(config) and not re.match(r"checkpoint-\d+$", Path(save_directory).name):
                    kwargs.setdefault("variant", VARIANT)
            super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
        finally:
            if entry is not None:  # a model inside another one shares its config, whose names are the outer model's
                self.config.tying = entry


def set_groups(model: PreTrainedModel, groups: list[TieGroup]) -> None:
    """Make each group one parameter (that of its root), and declare the groups."""
    for group in groups:
        share_parameter(model, group.names, parameter_of(model, group.root))
    declare(model, groups)


def declare(model: PreTrainedModel, groups: list[TieGroup]) -> None:
    """Declare the groups to transformers: on the model, and on every model inside for the names within it.

    A model inside that holds a whole tie gets the mixin too, so that it can be saved, resized and reloaded by itself.
    One that holds none no longer ties what its class declares.
    """
    inside = [
        (canonical(prefix), sub)
        for prefix, sub in model.named_modules()
        if isinstance(sub, PreTrainedModel) and prefix
    ]
    for prefix, sub in [("", model), *inside]:
        held = list(subgroups(groups, prefix)) if prefix else list(groups)
        if prefix and not held and not isinstance(sub, TiedModelMixin) and not stock_keys(sub):
            continue
        if held and not isinstance(sub, TiedModelMixin):
            sub.__class__ = with_mixin(TiedModelMixin, type(sub))
        elif prefix and not held and TiedModelMixin in mixins_of(type(sub)):
            # It got the mixin when it was made, by the config that it shares with the outer model.
            sub.__class__ = without_mixin(TiedModelMixin, type(sub))  # pyright: ignore[reportAttributeAccessIssue]
            sub.__dict__.pop("tie_groups", None)
        vars(sub).setdefault("_stock_tied_weights_keys", sub._tied_weights_keys)
        sub.all_tied_weights_keys = {name: group.root for group in held for name in group.aliases}
        sources = {name: _source(sub, group) for group in held for name in group.names}
        sub._tied_weights_keys = {name: source for name, source in sources.items() if name != source}
        if isinstance(sub, TiedModelMixin):
            if tie_assigned not in sub._load_state_dict_post_hooks.values():
                sub.register_load_state_dict_post_hook(tie_assigned)
            sub.tie_groups = held
            sub._ties_made = vars(model).get("_ties_made", True)
        if prefix and sub.config is not model.config:
            vars(sub.config).pop("tying", None)  # only the outer model has a record


def _is_copy(parameter: nn.Parameter | None, root: nn.Parameter) -> bool:
    """Whether tying the two loses nothing: both are on the meta device, or have equal values."""
    if parameter is None or parameter.is_meta != root.is_meta:
        return False
    return root.is_meta or same_values(parameter, root)


def _source(model: PreTrainedModel, group: TieGroup) -> str:
    """The name that a class would declare as the source of `group`: its root, or the embedding if that is the head.

    PEFT looks there for what is tied with the input embedding, whichever name is kept in a file.
    """
    head, embedding = (ask(model, f"get_{side}_embeddings") for side in ("output", "input"))
    slots = {name: find_slot(model, name) for name in group.names}
    if not isinstance(head, nn.Module) or slots[group.root] != (unwrap(head), "weight"):
        return group.root
    lookups = (name for name, slot in slots.items() if slot and embedding is not None and slot[0] is unwrap(embedding))
    return next(lookups, group.root)
