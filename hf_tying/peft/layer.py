"""An adapted module of Tied-LoRA: the base layer, its own v, and the shared factors that it uses."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.other import transpose
from torch import nn
from torch.nn import functional as F

from .config import TiedLoraConfig
from .matrices import Factor, InputSlot, LayerFactors, TiedMatrices, initialise_factors, scale_rows
from .plan import PlannedModule, features_of
from .scaled_linear import scaled_linear

#: The name of this class in pickles of 0.1.
Use = LayerFactors


class TiedLoraLayer(BaseTunerLayer):
    """The base class of all adapted modules. Their shared factors are in the `TiedMatrices` on the root of the model.

    Args:
        base_layer: layer that is adapted.
        module_name: name of the layer in the model.
        **kwargs: arguments of PEFT for quantised layers.
    """

    adapter_layer_names = ("tied_lora_v",)
    other_param_names = ("tied_lora_dropout", "uses")

    def __init__(self, base_layer: nn.Module, module_name: str, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.kind, self.in_features, self.out_features = features_of(self.get_base_layer())
        self.module_name = module_name
        self.tied_lora_v = nn.ModuleDict()
        self.tied_lora_dropout = nn.ModuleDict()
        # Plain containers, because these modules belong to the root, and must not become children of this layer too.
        self.uses: dict[str, LayerFactors] = {}
        self._matrices: list[TiedMatrices] = []
        self._disable_adapters = False
        self.merged_adapters = []

    def update_layer(
        self, adapter_name: str, matrices: TiedMatrices, planned: PlannedModule, config: TiedLoraConfig
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: name of the adapter.
            matrices: shared factors of the model.
            planned: names and sizes of the factors that this module uses.
            config: settings of the adapter.
        """
        names = planned.names
        shapes = {"A": (config.r, planned.a_columns), "B": (planned.b_rows, config.r)}
        if config.train_u:
            shapes["u"] = (config.r,)
        new, places = {}, {}
        for kind, shape in shapes.items():
            factor, made = matrices.factor(kind, adapter_name, getattr(names, kind), shape)
            places[kind] = getattr(matrices, f"tied_lora_{kind}")[adapter_name], getattr(names, kind)
            if made:
                new[kind] = factor.weight
        if config.train_v:
            self.tied_lora_v[adapter_name] = Factor(self.out_features)
            new["v"] = self.tied_lora_v[adapter_name].weight
        initialise_factors(new, config)
        self.tied_lora_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        slot = matrices.slots.setdefault((adapter_name, names.A, names.u), InputSlot())
        slot.members.add(self.module_name)
        trained = frozenset(kind for kind in "ABu" if getattr(config, f"train_{kind}"))
        self.uses[adapter_name] = LayerFactors(names, places, slot, config.scaling, trained)
        self._matrices = [matrices]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # What PEFT does to a layer is also done to the shared factors that it uses.

    def factors(self, adapter_name: str) -> dict[str, Factor]:
        """Return the shared factors that this module uses.

        Args:
            adapter_name: name of an adapter.

        Returns:
            The factors by "A", "B" and "u"; empty if this module does not have the adapter.
        """
        used = self.uses.get(adapter_name)
        found = {kind: used.factor(kind) for kind in "ABu"} if used else {}
        return {kind: factor for kind, factor in found.items() if factor is not None}

    def _get_available_adapters(self) -> set[str]:
        return set(self.uses)

    def _set_shared_requires_grad(self, adapter_names: Iterable[str], value: bool) -> None:
        for name in adapter_names:
            for kind, factor in self.factors(name).items():
                factor.requires_grad_(value and kind in self.uses[name].trained)

    def _follow(self) -> None:
        for matrices in self._matrices:
            matrices.follow(self.active_adapters, self._disable_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active, and train the shared factors that they train, as PEFT does for the others."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        active = set(self.active_adapters)
        self._set_shared_requires_grad(active, not inference_mode)
        self._set_shared_requires_grad(self.uses.keys() - active, False)
        self._follow()

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters, with their shared factors."""
        super().enable_adapters(enabled)
        if not enabled:
            self._set_shared_requires_grad(self.uses, False)
        self._follow()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters, with their shared factors."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        super().set_requires_grad(names, requires_grad)
        self._set_shared_requires_grad([name for name in names if name in self.uses], requires_grad)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze or unfreeze all adapters. transformers freezes an adapter that it has loaded by this method."""
        self._set_shared_requires_grad(self.uses, requires_grad)
        return super().requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter of this layer. PEFT deletes its shared factors by `TiedMatrices.delete_adapter`."""
        super().delete_adapter(adapter_name)
        self._follow()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        of_base, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        target = device or of_base
        if target is None or torch.device(target).type == "meta":
            return  # an offloaded base weight does not say where its adapter should be
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for factor in self.factors(adapter_name).values():
            if not factor.weight.is_meta:
                factor.to(target, dtype if dtype is not None and dtype.is_floating_point else None)

    # The update.

    def _v(self, adapter_name: str, device: torch.device | None) -> torch.Tensor | None:
        return self.tied_lora_v[adapter_name](device=device) if adapter_name in self.tied_lora_v else None

    def get_lora_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the factors of the ordinary LoRA with scaling 1 that has the same update.

        Args:
            adapter_name: name of an adapter of this module.

        Returns:
            `scaling * diag(u) A`, `(r, in_features)`, and `diag(v) B`, `(out_features, r)`.
        """
        used = self.uses[adapter_name]
        a = used.A(columns=self.in_features)
        b = used.B(rows=self.out_features, device=a.device)
        u = None if used.u is None else used.u(device=a.device)
        return scale_rows(a, u) * used.scaling, scale_rows(b, self._v(adapter_name, a.device))

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Compute the update that a merge adds to the base weight.

        Args:
            adapter_name: name of an adapter of this module.

        Returns:
            The update in the layout and on the device of the weight, in the dtype of the factors.
        """
        a, b = self.get_lora_factors(adapter_name)
        dtype = a.dtype
        if a.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            a, b = a.float(), b.float()  # some CPUs multiply slowly in half precision
        delta = transpose(b @ a, self.kind == "embedding" or self.fan_in_fan_out).to(dtype)
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return delta if device is None or device.type == "meta" else delta.to(device)

    def _low(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """Compute `x A^T`, `(..., r)`, once for all modules that share A and x.

        With dropout, each module has its own mask, as in LoRA, and computes its own value.
        """
        used = self.uses[adapter_name]
        random = self.training and isinstance(self.tied_lora_dropout[adapter_name], nn.Dropout)
        shared = len(used.slot.members) > 1 and not random and not torch.compiler.is_compiling()
        kept = used.slot.take(self.module_name, x, used.A.weight) if shared else None
        if kept is not None:
            return kept
        low = self._down(adapter_name, x, used.A(columns=self.in_features, device=x.device))
        if shared:
            used.slot.put(self.module_name, x, used.A.weight, low)
        return low

    def _down(self, adapter_name: str, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return F.linear(self.tied_lora_dropout[adapter_name](self._cast_input_dtype(x, matrix.dtype)), matrix)

    def _update(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """The adapter's update of the output for the input `x`."""
        used = self.uses[adapter_name]
        low = self._low(adapter_name, x)
        b = used.B(rows=self.out_features, device=x.device)
        u = None if used.u is None else used.u(device=x.device)
        return scaled_linear(low, b, u, self._v(adapter_name, x.device), used.scaling)

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Compute the output of the base layer with the updates of the active adapters.

        Args:
            x: input, `(..., in_features)`, or ids for an embedding.
            *args: further arguments of the base layer.
            adapter_names: adapter of each sample in the batch, or `"__base__"` for no adapter. Default: the active
                adapters for every sample.
            **kwargs: further arguments of the base layer.

        Returns:
            `(..., out_features)`, in the dtype of the base layer's output.
        """
        if adapter_names is not None:
            return self._mixed_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.disable_adapters or self.merged:
            if self.disable_adapters and self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in self.active_adapters:
            if name in self.uses:
                result = result + self._update(name, x)
        return result.to(dtype)

    def _mixed_forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> torch.Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name not in self.uses:
                continue
            rows = [row for row, of_row in enumerate(adapter_names) if of_row == name]
            result[rows] += self._update(name, x[rows]).to(result.dtype)
        return result

    # Merging.

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the adapters to the base weight.

        Args:
            safe_merge: whether to check the result first, and change nothing if it is not finite. Default `False`.
            adapter_names: names of the adapters. Default: the active ones.

        Raises:
            ValueError: with `safe_merge`, if the merged weight would not be finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.uses:
                continue
            weight = self.get_base_weight()
            if safe_merge:
                weight = weight.clone()
            weight += self.get_delta_weight(name).to(weight.dtype)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.set_base_weight(weight)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the updates of all merged adapters from the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            weight = self.get_base_weight()
            weight -= self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)
            self.set_base_weight(weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return `True`: every adapter has the update of an ordinary LoRA."""
        return True

    def __repr__(self) -> str:
        return "tied_lora." + super().__repr__()

    def extra_repr(self) -> str:
        """Return the note on quantisation in the printed form of the layer."""
        return quantization_extra_repr(self)


class Linear(TiedLoraLayer, nn.Module):
    """An adapted `nn.Linear`, GPT-2 `Conv1D`, or quantised linear layer."""

    def __init__(self, base_layer: nn.Module, module_name: str, fan_in_fan_out: bool = False, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        TiedLoraLayer.__init__(self, base_layer, module_name, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out


class Embedding(TiedLoraLayer, nn.Module):
    """An adapted `nn.Embedding`. A has one column for each row of the embedding. There is no dropout.

    The padding row has no update, because it gets no gradient.
    """

    def __init__(self, base_layer: nn.Module, module_name: str, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        TiedLoraLayer.__init__(self, base_layer, module_name, **kwargs)
        self.fan_in_fan_out = False

    def get_lora_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the factors of the ordinary LoRA with the same update. The padding column of A is 0."""
        a, b = super().get_lora_factors(adapter_name)
        padding = self.get_base_layer().padding_idx
        if padding is not None:  # A may be shared with an embedding without padding
            a = a.index_fill(1, torch.tensor(padding, device=a.device), 0)
        return a, b

    def _down(self, adapter_name: str, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return F.embedding(x, matrix.T, padding_idx=self.get_base_layer().padding_idx)

    def _update(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        update = super()._update(adapter_name, x)
        padding = self.get_base_layer().padding_idx
        if padding is not None:
            update = update.masked_fill((x == padding).unsqueeze(-1), 0)
        scale = self._get_embed_scale()
        return update if scale is None else update * scale.to(update.dtype)
