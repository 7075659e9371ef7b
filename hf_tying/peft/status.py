"""PEFT's status of a model's adapters, with the shared factors of Tied-LoRA in the row of each adapted layer."""

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft.peft_model import TunerLayerStatus

from .layer import TiedLoraLayer
from .matrices import TiedMatrices


def layer_status(
    wrapped: Callable[..., Any], instance: Any, args: tuple, kwargs: dict[str, Any]
) -> list[TunerLayerStatus]:
    """Wrap `get_layer_status`: leave out the holder of the shared factors, and report them in the layers' rows.

    The holder is not an adapted layer. PEFT would count it as one, and call a merge into all layers "irregular".

    Args:
        wrapped: PEFT's function.
        instance: `None`, because the function is not a method.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        A row for each adapted layer.
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
    """Write into a row whether the layer's factors of one adapter are trained, and their devices."""
    factors = layer.factors(adapter)
    if adapter in layer.tied_lora_v:
        factors["v"] = layer.tied_lora_v[adapter]
    # Factors that the adapter never trains do not count, such as A and B of VeRA.
    trained = {f.weight.requires_grad for kind, f in factors.items() if kind in layer.uses[adapter].trained | {"v"}}
    row.requires_grad[adapter] = trained.pop() if len(trained) == 1 else "irregular"
    row.devices[adapter] = sorted({factor.weight.device.type for factor in factors.values()})
