"""PEFT's status of a model's adapters, for Tied-LoRA: a row is an adapted layer, with the factors that it shares."""

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft.peft_model import TunerLayerStatus

from .layer import TiedLoraLayer
from .matrices import TiedMatrices


def layer_status(
    wrapped: Callable[..., Any], instance: Any, args: tuple, kwargs: dict[str, Any]
) -> list[TunerLayerStatus]:
    """Around `get_layer_status`: leave out the holder of the shared factors, and tell of them in the layers' rows.

    The holder is no adapted layer. PEFT would count it as one, and call a merge into all layers "irregular".
    """
    rows = wrapped(*args, **kwargs)
    model = args[0] if args else kwargs["model"]
    modules = dict((model.base_model if isinstance(model, PeftModel) else model).named_modules())
    for row in rows:
        if isinstance(layer := modules[row.name], TiedLoraLayer):
            for adapter in layer.uses:
                _tell(row, adapter, layer)
    return [row for row in rows if not isinstance(modules[row.name], TiedMatrices)]


def _tell(row: TunerLayerStatus, adapter: str, layer: TiedLoraLayer) -> None:
    """Whether the layer's factors of one adapter are trained, and where they are."""
    factors = layer.factors(adapter)
    if adapter in layer.tied_lora_v:
        factors["v"] = layer.tied_lora_v[adapter]
    # A factor that the adapter never trains, such as A and B of VeRA, has no say in it.
    trained = {f.weight.requires_grad for kind, f in factors.items() if kind in layer.uses[adapter].trained | {"v"}}
    row.requires_grad[adapter] = trained.pop() if len(trained) == 1 else "irregular"
    row.devices[adapter] = sorted({factor.weight.device.type for factor in factors.values()})
