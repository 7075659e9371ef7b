"""`TiedLoraConfig`: the settings of Tied-LoRA, with the factors that are trained and tied, and how they are shared."""

from collections import Counter
from dataclasses import InitVar, dataclass, field
from enum import Enum
from typing import Any

from peft import PeftConfig

#: The presets by the paper's names, as values for the fields of `TiedLoraConfig`.
VARIANTS = {
    "TL5": {"train_A": True, "train_B": True, "train_u": False, "train_v": False},
    "TL6": {"train_A": True, "train_B": True, "train_u": True, "train_v": True},
}
for _switches in VARIANTS.values():
    _switches |= {"tie_A": True, "tie_B": True, "tie_qkv": True}
SWITCHES = tuple(VARIANTS["TL6"])
SHARE_BY = ("module", "shape", "all")


class TiedPeftType(str, Enum):  # noqa: UP042, PEFT takes the name from `str(member)`, which a StrEnum does not give
    """The adapter type of Tied-LoRA. PEFT's own `PeftType` is an enum, and cannot get another member."""

    TIED_LORA = "TIED_LORA"


def is_tied_lora(config: Any) -> bool:
    """Return whether `config` is the config of a Tied-LoRA adapter.

    Args:
        config: any object, also `None`.
    """
    return getattr(config, "peft_type", None) == TiedPeftType.TIED_LORA


@dataclass
class TiedLoraConfig(PeftConfig):
    """Tied-LoRA: low-rank adapters whose matrices are shared by all layers.

    The update of the weight of module m in layer l is, with a scaling of `alpha / r`,

        dW[l, m] = alpha / r * diag(v[l, m]) B[m] diag(u[l]) A

    All layers share A `(r, in_features)` and B `(out_features, r)`. The query, key and value projections of one layer
    also share A and u `(r,)`. Each module has its own v `(out_features,)`. On q, k and v of width d in L layers, that
    makes 4dr + L(r + 3d) parameters, where LoRA has 6Ldr.

    Source: Renduchintala, Konuk, Kuchaiev, "Tied-LoRA: Enhancing parameter efficiency of LoRA with weight tying",
    NAACL 2024 (arXiv 2311.09578). From the paper: the form above; TL5 (A and B tied and trained, u = v = 1) and TL6
    (all four trained); one A for q, k and v, which the paper adapts as one fused matrix; `alpha = r`, "effectively
    removing its scaling effect". Two choices are this package's own, because the text that was used does not state
    them: the initial values (below), and which modules of different shapes share a matrix (`share_by`). It does not
    define TL1 to TL4 either; set the switches to get them.

    A new adapter changes nothing, because one trained factor starts at zero: the first that is trained of B, v, u and
    A. The other matrices start like LoRA's A, Kaiming uniform with a = sqrt(5). v starts at 1 and u at `u_initial`.

    Special cases: without ties and without u and v, it is LoRA (`tie_A = tie_B = tie_qkv = False`, `train_u = train_v
    = False`). With trained u and v and one frozen A and B for all modules, it is VeRA (`train_A = train_B = False`,
    `tie_qkv = False`, `share_by = "all"`, `u_initial = 0.1`).

    Raises:
        ValueError: a value is out of range, or the switches contradict `variant`.
    """

    r: int = field(
        default=8, metadata={"help": "Rank. 8 is PEFT's default for LoRA, and a rank of the paper's comparisons."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to adapt, a regular expression that matches whole names, or 'all-linear'. "
            "Default: query, key and value, as in the paper, if the model type is known."
        },
    )
    alpha: float | None = field(
        default=None, metadata={"help": "The update is scaled by alpha / r. Default: r, no scaling, as in the paper."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the input of A, in [0, 1)."})
    variant: str | None = field(
        default=None,
        metadata={
            "help": "TL5 (A and B trained) or TL6 (A, B, u and v trained), the paper's names. Default: TL6, changed "
            "by the switches below. The switches of a named variant cannot be changed."
        },
    )
    train_A: bool | None = field(
        default=None, metadata={"help": "Train A; otherwise it is frozen. Default: by variant."}
    )
    train_B: bool | None = field(
        default=None, metadata={"help": "Train B; otherwise it is frozen. Default: by variant."}
    )
    train_u: bool | None = field(
        default=None, metadata={"help": "Train a vector u between A and B; otherwise u is 1. Default: by variant."}
    )
    train_v: bool | None = field(
        default=None, metadata={"help": "Train a vector v after B; otherwise v is 1. Default: by variant."}
    )
    tie_A: bool | None = field(default=None, metadata={"help": "One A for all layers. Default: by variant."})
    tie_B: bool | None = field(default=None, metadata={"help": "One B for all layers. Default: by variant."})
    tie_qkv: bool | None = field(
        default=None,
        metadata={"help": "One A and one u for the query, key and value of a layer. Default: by variant."},
    )
    qkv_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the modules of one layer that tie_qkv ties. Default: the usual names, such as "
            "q_proj, k_proj, v_proj or query, key, value."
        },
    )
    share_by: str = field(
        default="module",
        metadata={
            "help": "Which modules share a matrix. 'module': modules of one name inside their layer "
            "(self_attn.q_proj). 'shape': modules whose matrix has the same shape. 'all': all modules share one A and "
            "one B, of which smaller modules use the first columns and rows, as in VeRA."
        },
    )
    layer_groups: list[list[int]] | None = field(
        default=None,
        metadata={"help": "Indices of the layers that share factors, such as [[0, 1], [2, 3]]. Default: all layers."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt. Default: all layers."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list of layers, or several such names. Default: the model's repeated part."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules not to adapt, or a regular expression."}
    )
    bias: str = field(default="none", metadata={"help": "Biases to train: 'none', 'all' or 'tied_lora_only'."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train and save whole, such as a new classifier."}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "The adapted weights have the shape (in, out), as in GPT-2's Conv1D."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start with an update of zero. False makes all factors random, which only tests need."},
    )
    u_initial: float = field(default=1.0, metadata={"help": "Initial value of u. VeRA uses 0.1."})
    ensure_weight_tying: bool = field(
        default=False,
        metadata={"help": "Refused: an adapter on tied embeddings has no form that a merge keeps. See TiedLoraModel."},
    )
    adapted_modules: dict[str, dict[str, str | int]] | None = field(
        default=None,
        metadata={
            "help": "Written at injection, not an input: the size of each adapted module, and the names of its A, B "
            "and u."
        },
    )

    # Names that follow PEFT's own methods. `alpha` and `dropout` are the saved names.
    tied_lora_alpha: InitVar[float | None] = None
    tied_lora_dropout: InitVar[float | None] = None
    # Settings of LoRA that have no meaning where layers share a matrix.
    rank_pattern: InitVar[dict | None] = None
    alpha_pattern: InitVar[dict | None] = None

    def __post_init__(
        self,
        tied_lora_alpha: float | None,
        tied_lora_dropout: float | None,
        rank_pattern: dict | None,
        alpha_pattern: dict | None,
    ) -> None:
        super().__post_init__()
        for name, given in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
            if given:
                raise ValueError(
                    f"{name}={given!r:.80}: the layers of a Tied-LoRA share their matrices, and so have one r and one "
                    "alpha. Give another adapter, with its own target_modules, to modules of another rank."
                )
        for name, default, given in (("alpha", None, tied_lora_alpha), ("dropout", 0.0, tied_lora_dropout)):
            if given is not None and getattr(self, name) not in (default, given):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} and tied_lora_{name}={given!r}: two names of one setting. Give "
                    "one, and None for the other."
                )
            setattr(self, name, getattr(self, name) if given is None else given)
        self.peft_type = TiedPeftType.TIED_LORA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._check_values()
        self._settle_switches()
        if self.alpha is None:
            self.alpha = self.r
        self.tied_lora_alpha, self.tied_lora_dropout = self.alpha, self.dropout

    @property
    def scaling(self) -> float:
        """The factor of the update, `alpha / r`."""
        return self.alpha / self.r

    def _check_values(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"r={self.r!r}: expected a rank, an integer of at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: expected a probability in [0, 1).")
        if self.share_by not in SHARE_BY:
            raise ValueError(f"share_by={self.share_by!r}: expected one of {', '.join(map(repr, SHARE_BY))}.")
        if self.bias not in ("none", "all", "tied_lora_only"):
            raise ValueError(f"bias={self.bias!r}: expected 'none', 'all' or 'tied_lora_only'.")
        if isinstance(self.target_modules, str) and None not in (self.layers_to_transform, self.target_modules):
            if self.target_modules != "all-linear":
                raise ValueError(
                    "layers_to_transform goes with a list of target_modules; a regular expression can name the layers "
                    "itself."
                )
        groups = self.layer_groups or []
        if not isinstance(groups, list | tuple) or not all(
            isinstance(group, list | tuple) and all(type(index) is int for index in group) for group in groups
        ):
            raise ValueError(f"layer_groups={groups!r:.120}: expected lists of indices, [[0, 1], [2, 3]].")
        times = Counter(index for group in groups for index in group)
        twice = sorted(index for index, count in times.items() if count > 1)
        if twice:
            raise ValueError(f"layer_groups={groups!r:.120}: layer {twice[0]} is in more than one group.")

    def _settle_switches(self) -> None:
        """Give every switch its value. `variant` becomes the name of the preset with these values, or `None`."""
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(
                f"variant={self.variant!r}: expected {' or '.join(VARIANTS)}. Other combinations of the paper have no "
                f"preset; leave variant out and set {', '.join(SWITCHES)}."
            )
        preset = VARIANTS[self.variant or "TL6"]
        for name in SWITCHES:
            given = getattr(self, name)
            if self.variant and given not in (None, preset[name]):
                raise ValueError(
                    f"{name}={given!r} contradicts variant={self.variant!r}, which has {name}={preset[name]!r}. Leave "
                    "variant out: the switches that are not given are then those of TL6."
                )
            if given is None:
                setattr(self, name, preset[name])
        values = {name: getattr(self, name) for name in SWITCHES}
        self.variant = next((name for name, switches in VARIANTS.items() if switches == values), None)
        if not any((self.train_A, self.train_B, self.train_u, self.train_v)):
            raise ValueError("Nothing would be trained: set one of train_A, train_B, train_u and train_v to True.")
