"""`TiedLoraModel`: the tuner of Tied-LoRA, which adds adapters to a model, runs, merges and saves them."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraConfig, LoraModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..ties.anatomy import Anatomy
from ..ties.sharding import refuse_in_parts
from .config import TiedLoraConfig
from .layer import Embedding, Linear, TiedLoraLayer
from .layers import COMPILED
from .matrices import CONTAINER, TiedMatrices
from .plan import features_of, modules_outside_adapters, of_all_layers, plan_adapter
from .sharing import FUSED_QKV, QKV, FactorNames, refuse_rank
from .tensor_names import BASE_PREFIX, file_from_state, state_from_file

logger = logging.get_logger(__name__)

#: The start of the names of all factors in a model, by which PEFT recognises them.
FACTOR_PREFIX = "tied_lora_"
# A forward pass of such a root runs all its children, so the container of the shared factors cannot be one of them.
_ROOTS_OF_LAYERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class TiedLoraModel(BaseTuner):
    """A model with Tied-LoRA adapters. `get_peft_model(model, TiedLoraConfig(...))` makes one.

    One module on the root of the model, `tied_matrices`, holds each shared A, B and u once. Each adapted layer uses
    them and has its own v. One parameter serves all layers, so its gradient is the sum over the layers.

    An adapter on an embedding that is tied to the softmax is trained as in PEFT, for the embedding alone. Its merge is
    refused, because the one matrix would also change for the softmax. `ensure_weight_tying=True` is for
    `modules_to_save`, as in LoRA. With such an adapter it is refused: the adapter of the softmax would be the
    transpose of the embedding's, with A and B exchanged, which is not a Tied-LoRA of its layer. To adapt both sides,
    untie the base (`hf_tying.untie`), or put the embedding into `modules_to_save`.

    Args:
        model (`torch.nn.Module`): model to adapt, in place.
        peft_config (`TiedLoraConfig`): settings of the adapter.
        adapter_name (`str`): name of the first adapter. PEFT's default is `"default"`.
        low_cpu_mem_usage (`bool`): whether the factors stay on the meta device until they are loaded. Default `False`.
    """

    prefix = FACTOR_PREFIX
    tuner_layer_cls = TiedLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # Checks before anything is changed.

    def _prepare_adapter_config(self, peft_config: TiedLoraConfig, model_config: dict[str, Any]) -> TiedLoraConfig:
        if peft_config.target_modules is None:
            names = {name.rpartition(".")[2] for name, _ in self.model.named_modules()}
            usual = {name for trio in QKV for name in trio if names.issuperset(trio)} | (names & set(FUSED_QKV))
            if usual:
                peft_config.target_modules = usual
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: TiedLoraConfig, model: nn.Module) -> None:
        """Plan the adapter, and refuse what cannot be adapted before the model is changed."""
        self._planned_of = peft_config
        self._planned = plan_adapter(_maybe_include_all_linear_layers(peft_config, model), model)
        for name in self._planned:
            self._refuse_where_weights_are_read(model, name.rpartition(".")[2])
        names = {name: planned.names for name, planned in self._planned.items()}
        refuse_rank(peft_config.r, names)
        _refuse_idle_setting(peft_config, names)
        _tell_of_nothing_shared(peft_config, names)

    def _refuse_where_weights_are_read(self, model: nn.Module, target_name: str) -> None:
        """Refuse what PEFT refuses for LoRA: Mamba's kernels read the weight of `out_proj`, not the module."""
        super()._check_target_module_compatiblity(LoraConfig(), model, target_name)

    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie

    def _add_targets_to_tie(self, peft_config: TiedLoraConfig, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            "ensure_weight_tying=True: Tied-LoRA has no adapter for two tied embeddings, as that of the softmax would "
            "be the transpose of the other one's. Untie the base first (hf_tying.untie), or put the embedding into "
            "modules_to_save."
        )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to a model, and record the adapted modules in its config.

        Args:
            model: model to adapt, in place.
            adapter_name: name of the adapter.
            *args: further arguments of PEFT's method.
            **kwargs: further arguments of PEFT's method. `state_dict` is not used, because only the config has the
                names of the adapted modules.

        Raises:
            NoMatchingPeftModuleError: no module has a name in `target_modules`. The message has the nearest names.
        """
        kwargs.pop("state_dict", None)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            near = _nearest(self.peft_config[adapter_name].target_modules, model)
            raise NoMatchingPeftModuleError(f"{error} {near}".strip()) from None
        self.peft_config[adapter_name].adapted_modules = _adapted_modules(model, adapter_name)

    def _check_target_module_exists(self, peft_config: TiedLoraConfig, key: str) -> bool | re.Match[str] | None:
        found = BaseTuner._check_target_module_exists(of_all_layers(peft_config), key)
        if not found:
            return found
        planned = self._planned if peft_config is self._planned_of else plan_adapter(peft_config, self.model)
        return key in planned

    # Injection.

    def _create_and_replace(
        self,
        peft_config: TiedLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        layer = target if isinstance(target, TiedLoraLayer) else self._new_layer(peft_config, target, current_key)
        planned = self._planned[layer.module_name]
        if layer is not target:
            layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, self._matrices(adapter_name, layer), planned, peft_config)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _new_layer(self, peft_config: TiedLoraConfig, target: nn.Module, name: str) -> TiedLoraLayer:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, nn.Embedding):
            return Embedding(target, name)
        is_conv1d = isinstance(base, Conv1D)
        if peft_config.fan_in_fan_out != is_conv1d:
            kind = "`Conv1D`" if is_conv1d else "`torch.nn.Linear`"
            warnings.warn(
                f"fan_in_fan_out is set to {not is_conv1d} but the target module is {kind}. Setting fan_in_fan_out to "
                f"{is_conv1d}.",
                stacklevel=2,
            )
            peft_config.fan_in_fan_out = is_conv1d
        return Linear(target, name, fan_in_fan_out=is_conv1d, **get_quantization_kwargs(self))

    def _matrices(self, adapter_name: str, layer: TiedLoraLayer) -> TiedMatrices:
        """The module of the model's shared factors, with a place for this adapter. It is made on first use."""
        found = next((module for module in self.model.modules() if isinstance(module, TiedMatrices)), None)
        if found is None:
            found = TiedMatrices(adapter_name)
            root = getattr(self.model, "_orig_mod", self.model)  # the model inside the wrapper of torch.compile
            owner = layer if isinstance(root, _ROOTS_OF_LAYERS) else root
            # An automatic device map starts with the first child, so this one is not offloaded to a disk.
            owner._modules = {CONTAINER: found, **owner._modules}
        found.update(adapter_name)
        return found

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, TiedMatrices):  # the adapters are being unloaded
            delattr(parent, child_name)
            return
        if isinstance(child, AuxiliaryTrainingWrapper):  # a fully trained module, such as a classifier
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            return
        for layer in self.model.modules():
            if isinstance(layer, TiedLoraLayer):
                for factor in layer.factors(adapter_name).values():
                    if factor.weight.dtype.itemsize < 4:
                        factor.float()

    # Forward passes and merges.

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in self.modules() if isinstance(layer, TiedLoraLayer) for name in layer.uses}
        unknown = sorted(set(adapter_names) - known - {"__base__"})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams") or 1
        # A beam search runs the encoder once for each sample, and the decoder once for each beam.
        repeated = [name for name in adapter_names for _ in range(beams)]
        encoder = getattr(self.model, "get_encoder", lambda: None)() if beams > 1 else None
        inside_encoder = set(encoder.modules()) if encoder is not None and encoder is not self.model else set()
        handles = []
        for module in self.modules():
            if isinstance(module, TiedLoraLayer | AuxiliaryTrainingWrapper) and not isinstance(module, TiedMatrices):
                names = adapter_names if module in inside_encoder else repeated
                hook = partial(_pass_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "fit",
        r: int | None = None,
        iterations: int = 300,
    ) -> None:
        """Add an adapter that is the weighted sum of others, as LoRA's method of this name does.

        Args:
            adapters: names of adapters of the model.
            weights: one weight for each adapter; negative ones subtract.
            adapter_name: name of the new adapter. It is not made active.
            combination_type: `"fit"` (the default, because it is always possible) adds the adapter of rank `r` that is
                nearest to the sum, see `fit_from_lora`, and logs its relative error. `"cat"` is exact and has the sum
                of the ranks; it needs adapters without v (TL5) that share the same factors.
            r: rank of a fit. Default: the largest rank of the adapters.
            iterations: the most sweeps of a fit. Default 300, as in `fit_from_lora`.

        Raises:
            ValueError: an adapter is unknown, the name is taken, the weights are wrong, or the adapters have no sum of
                this type.
        """
        from .fitting.weighted import add_weighted_adapter  # most models never need the fit

        refuse_in_parts(self, "combine the adapters of", gathers=True)
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, r, iterations)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        owners: dict[int, set[str]] = {}
        known = isinstance(self.model, PreTrainedModel)
        idle = {name.rpartition(".")[0] for name in Anatomy(self.model).carriers} if known else set()
        for name, module in self.model.named_modules():
            if name in idle:  # a carrier only holds a matrix for the modules that use it
                continue
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), set()).add(name)
        for name, layer in self.model.named_modules():
            if isinstance(layer, TiedLoraLayer) and layer.uses:
                weight = getattr(layer.get_base_layer(), "weight", None)
                others = sorted(owners.get(id(weight), set()) - {f"{name}.base_layer"})
                if others:
                    raise ValueError(
                        f"Cannot merge: the weight of {name!r} is also that of "
                        f"{others[0].removesuffix('.base_layer')!r}, and the merged update would change both. Keep "
                        "the adapter unmerged; or untie first: base = model.unload(); hf_tying.untie(base); then load "
                        "the adapter on it and merge."
                    )

    # Names in a file.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: TiedLoraConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        # Several models may share the caller's config, so its `adapted_modules` are set again for each file.
        config.adapted_modules = _adapted_modules(model, adapter_name)
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        found |= {key: value for key, value in state_dict.items() if f"{CONTAINER}.{FACTOR_PREFIX}" in key}
        # Names have this prefix in a PeftModel, and not in a model that adapters were put into directly.
        start = BASE_PREFIX if all(key.startswith(BASE_PREFIX) for key in found) else ""
        factors, others = {}, {}
        for key, value in found.items():
            name = cls._remove_adapter_name_from_key(key, adapter_name)
            _, container, inside = name.rpartition(f"{CONTAINER}.")
            inside = inside.removeprefix(start)
            (others if name == key else factors)[container + inside.replace(COMPILED, "")] = value
        factors = file_from_state(factors, config)
        return {start + key: value for key, value in (others | factors).items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        parts = key.split(".")
        for index, part in enumerate(parts[:-1]):
            # Modules and factors may have the adapter's name too. Only a part in this place is the adapter's name.
            if part.startswith(FACTOR_PREFIX) and parts[index + 1] == adapter_name:
                return ".".join(parts[: index + 1] + parts[index + 2 :])
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: TiedLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        config.adapted_modules = _adapted_modules(model, adapter_name)
        names = {}
        for key in model.state_dict():
            saved = cls._remove_adapter_name_from_key(key, adapter_name)
            _, container, inside = saved.rpartition(f"{CONTAINER}.")
            if saved != key and (container or COMPILED in inside):
                names[BASE_PREFIX + container + inside.removeprefix(BASE_PREFIX).replace(COMPILED, "")] = key
        state = {names.get(key, key): value for key, value in state_from_file(state_dict, config).items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state)


def _adapted_modules(model: nn.Module, adapter_name: str) -> dict[str, dict[str, str | int]]:
    """The modules of an adapter by their names, each with the names of its factors."""
    return {
        layer.module_name.replace(COMPILED, ""): layer.uses[adapter_name].names.entry
        for layer in model.modules()
        if isinstance(layer, TiedLoraLayer) and adapter_name in layer.uses
    }


def _refuse_idle_setting(config: TiedLoraConfig, names: dict[str, FactorNames]) -> None:
    last = {name.rpartition(".")[2] for name in names}
    if config.tie_qkv and config.qkv_modules and names and last.isdisjoint(config.qkv_modules):
        raise ValueError(
            f"qkv_modules={config.qkv_modules!r}: none of the adapted modules has such a name. Expected names of "
            f"theirs ({', '.join(sorted(last)[:12])}); or leave qkv_modules out, or set tie_qkv=False."
        )


def _tell_of_nothing_shared(config: TiedLoraConfig, names: dict[str, FactorNames]) -> None:
    """Warn if an adapter that shares A or B has no factor that two layers have in common."""
    tied = [kind for kind in "AB" if getattr(config, f"tie_{kind}")]
    used = Counter((kind, getattr(of, kind), of.u) for of in names.values() for kind in tied)
    layers = Counter((kind, name) for kind, name, _ in used)
    if tied and len(names) > 1 and max(layers.values()) == 1:
        logger.warning(
            f"Tied-LoRA: no two layers share a factor, of {len(names)} adapted modules ({', '.join(list(names)[:3])}, "
            "...). Say where the layers are by layers_pattern='name of the list of layers', or share by "
            "share_by='shape'. If this is intended, set tie_A=False and tie_B=False."
        )


def _nearest(targets: str | Iterable[str] | None, model: nn.Module) -> str:
    """The end of a message: the names of modules that are most similar to the targets that were not found."""
    if not targets:
        return ""
    names = {name.rpartition(".")[2] for name, module in modules_outside_adapters(model) if features_of(module)}
    wanted = [targets] if isinstance(targets, str) else sorted(targets)
    near = {match for name in wanted for match in get_close_matches(name.rpartition(".")[2], names, n=3, cutoff=0.5)}
    if near:
        return f"The nearest names in the model: {', '.join(sorted(near))}."
    return f"Modules that can be adapted: {', '.join(sorted(names)[:12]) or 'none'}."


def _pass_adapter_names(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple, dict[str, Any]]:
    return args, kwargs | {"adapter_names": adapter_names}
