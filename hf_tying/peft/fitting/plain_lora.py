"""The updates in a LoRA adapter's file, if it is plain LoRA."""

import re
from math import sqrt

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from ...report.layer_order import in_layer_order
from ..tensor_names import BASE_PREFIX
from .alternating import Update

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
#: Settings of LoRA under which a module's update is not lora_B lora_A, or the base model is changed; and why.
_NOT_PLAIN = {
    "use_dora": "DoRA also scales the columns of the adapted weight",
    "target_parameters": "it adapts parameters that are not the weights of modules",
    "layer_replication": "it has copies of layers",
    "trainable_token_indices": "it also trains single tokens",
    "lora_bias": "it has a bias of its own",
    "use_qalora": "its A is of pooled inputs",
    "use_bdlora": "its matrices are block diagonal",
    "alora_invocation_tokens": "it is active for a part of the tokens only",
    "arrow_config": "it chooses among adapters for each token",
    "megatron_config": "its layers are Megatron's",
    "kasa_config": "it has singular values of its own, and a changed base model",
    "monteclora_config": "it draws its weights",
}
#: Initialisations that leave the base weights unchanged. Others subtract their start from them.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "default")


def updates_of_lora(
    config: LoraConfig, tensors: dict[str, torch.Tensor], place: str
) -> tuple[dict[str, Update], dict[str, str], dict[str, torch.Tensor]]:
    """The updates of a plain LoRA adapter, with the scaling multiplied in.

    Args:
        config: the adapter's settings.
        tensors: the tensors of its file.
        place: the name of the adapter in messages.

    Returns:
        The update of each module; the kind of each module, "linear" or "embedding"; and the tensors that are no
        factors.

    Raises:
        ValueError: the adapter is not plain LoRA.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ValueError(f"{place} is an adapter of type {kind}: expected LORA.")
    reasons = [
        f"{name}={getattr(config, name)!r}: {why}" for name, why in _NOT_PLAIN.items() if getattr(config, name, 0)
    ]
    start = config.init_lora_weights
    if (start.lower() if isinstance(start, str) else start) not in _PLAIN_STARTS:
        reasons.append(
            f"init_lora_weights={start!r}: it belongs to a changed base model; PEFT's save_pretrained can "
            "convert it (path_initial_model_for_weight_conversion)"
        )
    found: dict[str, dict[str, torch.Tensor]] = {}
    kinds, others = {}, {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key.removeprefix(BASE_PREFIX))
        if match is None:
            if ".lora_" in key:
                reasons.append(f"its file has {key!r}, which is no factor of plain LoRA")
            others[key] = tensor
            continue
        if tensor.ndim != 2:
            reasons.append(f"{key!r} is {tuple(tensor.shape)}: only linear layers and embeddings have a tied form")
        found.setdefault(match["module"], {})[match["side"]] = tensor
        kinds[match["module"]] = "embedding" if match["embedding"] else "linear"
    reasons += [f"{module!r} has no lora_{'AB'.strip(*sides)}" for module, sides in found.items() if len(sides) == 1]
    if not found:
        reasons.append("its file has no factors")
    if reasons:
        more = f"; and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        raise ValueError(
            f"{place} has no tied form: {'; '.join(reasons[:4])}{more}. Expected plain LoRA of linear layers and "
            "embeddings."
        )
    updates = {}
    for module in in_layer_order(found):
        a, b = found[module]["A"], found[module]["B"]
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
        scaling = alpha / (sqrt(len(a)) if config.use_rslora else len(a))
        # In float32 at least, because the scaling may not be exact in the dtype of the file.
        updates[module] = Update(b, (a.to(torch.promote_types(a.dtype, torch.float32)) * scaling))
    return updates, kinds, others
