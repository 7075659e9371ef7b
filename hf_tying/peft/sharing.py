"""Which modules share which factor: from a `TiedLoraConfig` and a module's name to the names of its A, B and u."""

import re
from dataclasses import dataclass

from .config import TiedLoraConfig

#: The part that torch.compile adds to the names of modules. The names in a file are without it.
COMPILED = "_orig_mod."
#: The query, key and value projections of one layer, by the names that they have in transformers' models.
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
#: The names of a module that is all three projections in one matrix.
FUSED_QKV = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv", "attn_qkv")


@dataclass(frozen=True)
class FactorNames:
    """The names of the factors of one adapted module, and the module's size.

    Modules that name the same factor share it. As a dict, this is the module's entry in `adapted_modules` of a saved
    `adapter_config.json`.

    Args:
        A: name of the module's A. The module uses the first `in_features` columns.
        B: name of the module's B. The module uses the first `out_features` rows.
        u: name of the module's u.
        u_rows: name of the matrix in the file whose rows are the u of all layers.
        v_rows: name of the matrix in the file whose rows are the v of all layers.
        kind: `"linear"` or `"embedding"`.
        in_features: number of the module's inputs; for an embedding, `num_embeddings`.
        out_features: number of the module's outputs; for an embedding, `embedding_dim`.
    """

    A: str
    B: str
    u: str
    u_rows: str
    v_rows: str
    # The factors in the file do not tell the module's size, because a factor may be wider than the module.
    kind: str
    in_features: int
    out_features: int

    @property
    def largest_rank(self) -> int:
        """The largest rank that an update of the module can have."""
        return min(self.in_features, self.out_features)


#: The name of this class in pickles of 0.1.
Sharing = FactorNames


def name_factors(
    config: TiedLoraConfig, module_name: str, in_features: int, out_features: int, kind: str
) -> FactorNames:
    """Name the factors of one module.

    A name says what shares the factor, so it is the same in every process and for every part of a model:
    `self_attn-qkv-4096` is the A of q, k and v in the `self_attn` of all layers, and `model-layers-3-...` is the A of
    one layer.

    Args:
        config: the adapter's settings.
        module_name: full name of the module in the model.
        in_features: number of the module's inputs; for an embedding, `num_embeddings`.
        out_features: number of the module's outputs; for an embedding, `embedding_dim`.
        kind: `"linear"` or `"embedding"`. Modules of different kinds never share.

    Raises:
        ValueError: `layer_groups` leaves out the module's layer.
    """
    layer, index, inside = split_module_name(module_name.replace(COMPILED, ""))
    own = f"{layer}-" if layer else ""
    together = _layer_group(config, index) if layer else ""
    # A and u belong to the input, which query, key and value have in common. B and v belong to the output.
    of_input = (_qkv_name(config, inside) if config.tie_qkv else None) or inside
    if config.share_by == "module":
        a, b = f"{of_input}-{in_features}", f"{inside}-{out_features}"
    elif config.share_by == "shape":
        a, b = f"{kind}-{in_features}", f"{kind}-{out_features}"
    else:
        a = b = f"{kind}-all"
    a = (together if config.tie_A else own) + a
    b = (together if config.tie_B else own) + b
    names = a, b, own + of_input, f"{of_input}-{config.r}", f"{inside}-{out_features}"
    # The names become names of modules, which cannot contain dots.
    return FactorNames(*(name.replace(".", "-") for name in names), kind, in_features, out_features)


def split_module_name(module_name: str) -> tuple[str | None, int | None, str]:
    """Split a module's name into its layer, the layer's index, and the module's name inside the layer.

    `model.layers.3.self_attn.q_proj` gives `("model.layers.3", 3, "self_attn.q_proj")`: the layer ends with the first
    number in the name. A module outside all layers gives `(None, None, <its full name>)`.
    """
    found = re.fullmatch(r"(?P<layer>(?:[^.]*\.)*?(?P<index>\d+))\.(?P<inside>.+)", module_name)
    if found is None:
        return None, None, module_name
    return found["layer"], int(found["index"]), found["inside"]


def refuse_rank(r: int, modules: dict[str, FactorNames]) -> None:
    """Refuse a rank that no adapted module can have. Without modules there is nothing to refuse.

    Raises:
        ValueError: `r` is more than the largest rank of every module.
    """
    largest = max(modules, key=lambda module: modules[module].largest_rank, default=None)
    if largest is not None and r > modules[largest].largest_rank:
        raise ValueError(
            f"r={r} is more than any adapted module has: the largest, {largest!r}, has rank "
            f"{modules[largest].largest_rank}. Expected r of at most that."
        )


def _layer_group(config: TiedLoraConfig, index: int) -> str:
    """The start of the name of a factor that the layers of a group share; empty where all layers share it."""
    if not config.layer_groups:
        return ""
    for group in config.layer_groups:
        if index in group:
            return "layers" + "_".join(map(str, sorted(group))) + "-"
    raise ValueError(
        f"layer_groups={config.layer_groups!r} does not say with which layers layer {index} shares. Add it to a "
        "group, or give it one of its own, or keep it out by layers_to_transform."
    )


def _qkv_name(config: TiedLoraConfig, inside: str) -> str | None:
    """`self_attn.qkv` for `self_attn.q_proj`; `None` for a module that is not a query, key or value projection."""
    path, dot, name = inside.rpartition(".")
    for names in [tuple(config.qkv_modules)] if config.qkv_modules else QKV:
        if name in names:
            return f"{path}{dot}qkv"
    return None
