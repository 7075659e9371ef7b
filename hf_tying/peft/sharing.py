"""The sharing of factors: names of the A, B and u of each module, from a `TiedLoraConfig` and the module's name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from torch import nn

from .config import TiedLoraConfig
from .layers import Features, Place, find_layers

#: The names of the query, key and value projections of one layer in transformers' models.
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
#: The names of a module that has all three projections in one matrix.
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
        padding: id of an embedding whose row has no update; `None` if there is none.
    """

    A: str
    B: str
    u: str
    u_rows: str
    v_rows: str
    # The module's size is recorded, because a factor in the file may be wider than the module.
    kind: str
    in_features: int
    out_features: int
    padding: int | None = None

    @property
    def entry(self) -> dict[str, str | int]:
        """The module's entry in `adapted_modules`."""
        return {part: value for part, value in asdict(self).items() if value is not None}

    def is_like(self, other: "FactorNames") -> bool:
        """Return whether both name the same factors for modules of the same size."""
        return replace(self, padding=None) == replace(other, padding=None)

    @property
    def largest_rank(self) -> int:
        """The largest rank that an update of the module can have."""
        return min(self.in_features, self.out_features)


#: The name of this class in pickles of 0.1.
Sharing = FactorNames


def name_factors(config: TiedLoraConfig, modules: Mapping[str, Features]) -> dict[str, FactorNames]:
    """Name the factors of the modules of an adapter.

    A name is made of what the sharing modules have in common, so it is the same in every process and for every part of
    a model: `self_attn-qkv-4096` is the A of q, k and v in the `self_attn` of all layers, and `model-layers-3-...` is
    the A of one layer.

    Args:
        config: settings of the adapter.
        modules: kind and size of each module by its full name: `"linear"` or `"embedding"` (modules of different kinds
            never share), the number of its inputs (for an embedding, `num_embeddings`), and the number of its outputs
            (`embedding_dim`).

    Returns:
        The names of the factors of each module, by its full name.

    Raises:
        ValueError: `layer_groups` leaves out the layer of a module.
    """
    places = find_layers(modules, config.layers_pattern)
    return {name: _names_of_one(config, places[name], *features) for name, features in modules.items()}


def _names_of_one(config: TiedLoraConfig, place: Place, kind: str, in_features: int, out_features: int) -> FactorNames:
    layer, index, inside = place.layer, place.index, place.inside
    own = f"{layer}-" if layer else ""
    together = _layer_group(config, index) if layer else ""
    # A and u depend on the input, which query, key and value have in common. B and v depend on the output.
    of_input = (_qkv_name(config, inside) if config.tie_qkv else None) or inside
    if config.share_by == "module":
        a, b = f"{of_input}-{in_features}", f"{inside}-{out_features}"
    elif config.share_by == "shape":
        a, b = f"{kind}-{in_features}", f"{kind}-{out_features}"
    else:
        a = b = f"{kind}-all"
    a = (together if config.tie_A else own) + a
    b = (together if config.tie_B else own) + b
    u = own + of_input
    u += "-" * hasattr(nn.ModuleDict, u)  # a name such as `keys` cannot be that of a module in it
    names = a, b, u, f"{of_input}-{config.r}", f"{inside}-{out_features}"
    # The names become names of modules, which cannot contain dots.
    return FactorNames(*(name.replace(".", "-") for name in names), kind, in_features, out_features)


def recorded_names(config: TiedLoraConfig) -> dict[str, FactorNames]:
    """Read `adapted_modules`, the record of the modules that the adapter was injected into.

    Args:
        config: settings of the adapter.

    Returns:
        The names of the factors of each module; empty before an injection.

    Raises:
        ValueError: the record does not have the form that an injection writes, or contradicts the other settings. The
            tied form and its export would then be different functions.
    """
    wrong = "The adapted_modules of this Tied-LoRA config are not as they were saved"
    advice = "Expected the adapter_config.json that was saved with the adapter."
    recorded = config.adapted_modules or {}
    if not isinstance(recorded, dict) or not all(isinstance(of, dict) for of in recorded.values()):
        raise ValueError(f"{wrong}: expected a dict of dicts, found {recorded!r:.80}. {advice}")
    kinds = {part.name: str if part.type is str else int for part in fields(FactorNames)}
    for module, of in recorded.items():
        known = of.keys() | {"padding"} == kinds.keys()
        if not known or not all(type(value) is kinds[part] for part, value in of.items()):
            raise ValueError(f"{wrong}: expected {', '.join(kinds)} of {module!r}, found {of!r:.120}. {advice}")
    names = {module: FactorNames(**of) for module, of in recorded.items()}
    expected = name_factors(config, sizes_of(names))
    for module, of in names.items():
        if not of.is_like(expected[module]):
            raise ValueError(
                f"{wrong}: the other settings make {expected[module].entry} of {module!r}, found {of.entry}. {advice}"
            )
    return names


def sizes_of(modules: Mapping[str, FactorNames]) -> dict[str, Features]:
    """Return kind and size of modules that already have names, as `name_factors` takes them.

    Args:
        modules: names of the factors of each module.
    """
    return {name: (of.kind, of.in_features, of.out_features) for name, of in modules.items()}


def refuse_rank(r: int, modules: dict[str, FactorNames]) -> None:
    """Refuse a rank that no adapted module can have. Without modules, nothing is refused.

    Args:
        r: rank.
        modules: names of the factors of each module, with its size.

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
    """The start of the name of a factor that a group of layers shares; empty if all layers share it."""
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
