"""Which modules share which matrix: from a `TiedLoraConfig` and a module's name to the names of its A, B and u."""

import re
from dataclasses import dataclass

from torch import nn

from .config import TiedLoraConfig

#: What torch.compile puts into the names of modules; in a file they are without it.
COMPILED = "_orig_mod."
#: The query, key and value of one layer, by the names that transformers' models give them.
QKV = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("linear_q", "linear_k", "linear_v"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
)
#: And where they are one matrix.
FUSED_QKV = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv", "attn_qkv")


@dataclass(frozen=True)
class Sharing:
    """The names of the factors of one adapted module, and its size; modules with the same name of a factor share it.

    Args:
        A: name of its A; of its columns the module uses the first `in_features`.
        B: name of its B; of its rows the module uses the first `out_features`.
        u: name of its u.
        u_rows: name of the matrix in the file that has the u of all layers as its rows.
        v_rows: name of the matrix in the file that has the v of all layers as its rows.
        kind: `"linear"` or `"embedding"`.
        in_features: of the module; for an embedding its number of rows.
        out_features: of the module.
    """

    A: str
    B: str
    u: str
    u_rows: str
    v_rows: str
    # What the file alone does not tell: a factor may be wider than the module.
    kind: str
    in_features: int
    out_features: int


def sharing_of(config: TiedLoraConfig, module_name: str, in_features: int, out_features: int, kind: str) -> Sharing:
    """Name the factors of one module.

    The names are made of what is shared, so that they are the same in every process and for every part of a model:
    `self_attn-qkv-4096` is the A of the q, k and v inside all `self_attn`, `model-layers-3-...` that of one layer.

    Args:
        config: the adapter's settings.
        module_name: full name of the module in the model.
        in_features: of the module; for an embedding its number of rows.
        out_features: of the module.
        kind: `"linear"` or `"embedding"`; these never share.
    """
    layer, index, inside = split_name(module_name.replace(COMPILED, ""))
    own = f"{layer}-" if layer else ""
    together = _together(config, index) if layer else ""
    # A and u are those of the input, which query, key and value have in common; B and v are those of the output.
    of_input = (_of_qkv(config, inside) if config.tie_qkv else None) or inside
    if config.share_by == "module":
        a, b = f"{of_input}-{in_features}", f"{inside}-{out_features}"
    elif config.share_by == "shape":
        a, b = f"{kind}-{in_features}", f"{kind}-{out_features}"
    else:
        a = b = f"{kind}-all"
    a = (together if config.tie_A else own) + a
    b = (together if config.tie_B else own) + b
    names = a, b, own + of_input, f"{of_input}-{config.r}", f"{inside}-{out_features}"
    # Names of modules, which these become, have no dots.
    return Sharing(*(name.replace(".", "-") for name in names), kind, in_features, out_features)


def split_name(module_name: str) -> tuple[str | None, int | None, str]:
    """A module's layer, the index of that, and the module's name inside of it.

    `("model.layers.3", 3, "self_attn.q_proj")` for `model.layers.3.self_attn.q_proj`: the layer ends with the first
    number in the name. A module outside of all layers has its full name.
    """
    found = re.fullmatch(r"(?P<layer>(?:[^.]*\.)*?(?P<index>\d+))\.(?P<inside>.+)", module_name)
    if found is None:
        return None, None, module_name
    return found["layer"], int(found["index"]), found["inside"]


def _together(config: TiedLoraConfig, index: int) -> str:
    if not config.layer_groups:
        return ""
    for group in config.layer_groups:
        if index in group:
            return "layers" + "_".join(map(str, sorted(group))) + "-"
    raise ValueError(
        f"layer_groups={config.layer_groups!r} does not say with which layers layer {index} shares. Add it to a "
        "group, or give it one of its own, or keep it out by layers_to_transform."
    )


def _of_qkv(config: TiedLoraConfig, inside: str) -> str | None:
    """`self_attn.qkv` for `self_attn.q_proj`; `None` for a module that is none of the three."""
    path, dot, name = inside.rpartition(".")
    for names in [tuple(config.qkv_modules)] if config.qkv_modules else QKV:
        if name in names:
            return f"{path}{dot}qkv"
    return None


def features_of(module: nn.Module) -> tuple[str, int, int] | None:
    """`(kind, in_features, out_features)` of a module that can be adapted, else `None`."""
    from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
    from peft.utils import resolve_quantization_backend
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, nn.Embedding):
        return "embedding", module.num_embeddings, module.embedding_dim
    # A quantised layer that is a Linear is not asked for more: for torchao PEFT wants what is not known here.
    backend = None if isinstance(module, nn.Linear | Conv1D) else resolve_quantization_backend(module)
    if isinstance(module, nn.Linear | Conv1D) or (backend is not None and backend.layer_type == "linear"):
        found = _get_in_out_features(module)
        return None if None in found else ("linear", *found)
    return None
