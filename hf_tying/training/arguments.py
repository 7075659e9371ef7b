"""Flags for `HfArgumentParser`, beside `TrainingArguments`: what to tie, and what to train by."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import LOSSES, SCHEMES, TyingConfig, TyingError
from ..losses.contrastive import NEGATIVES
from ..objectives.objective import AugmentedObjective, ContrastiveObjective, Objective
from .flag_files import read_mapping

if TYPE_CHECKING:
    from .callbacks import TyingCallback


def _with_prefix(name: str) -> list[str]:
    """The longer spellings of a flag, for a command line where the short one would say too little."""
    return [f"--tying_{name}", f"--tying_{name}".replace("_", "-")]


@dataclass
class TyingArguments:
    """Flags that declare ties. None of them given leaves the model as its own config declares it."""

    _argument_group_name = "ties"

    scheme: str | None = field(
        default=None,
        metadata={
            "aliases": _with_prefix("scheme"),
            "help": "The usual tie groups by name: two_way (target and output embedding, all that a causal language "
            "model has), source_target, three_way (source, target and output embedding), or none (untie). Default: "
            "what the model's config says.",
            "choices": list(SCHEMES),
        },
    )
    groups_file: str | None = field(
        default=None,
        metadata={
            "aliases": _with_prefix("groups_file"),
            "help": "JSON or YAML file with further tie groups: a mapping from a group's name to a list of parameter "
            "or module names, the first of which is the root.",
        },
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "aliases": _with_prefix("init_from"),
            "help": "Where a tied parameter starts when the group's values differ: a role (source, target, output), "
            "mean, or a parameter name. Differing values and no choice is an error: nothing is dropped unasked.",
        },
    )
    on_conflict: str = field(
        default="error",
        metadata={
            "aliases": _with_prefix("on_conflict"),
            "help": "What to do when a checkpoint has different values for the names of one group: error, "
            "keep_untied, or use:<parameter name>.",
        },
    )
    save_format: str | None = field(
        default=None,
        metadata={
            "aliases": _with_prefix("save_format"),
            "help": "dedup writes each group once; portable writes every name, for loaders without hf_tying. Default: "
            "dedup where the stock class re-ties these groups by itself, portable elsewhere.",
            "choices": ["dedup", "portable"],
        },
    )
    loss: str = field(
        default="stock",
        metadata={
            "aliases": _with_prefix("loss"),
            "help": "tied trains through the tied softmax: the same loss, computed by blocks of the vocabulary, "
            "without the logits.",
            "choices": list(LOSSES),
        },
    )
    log_roles: bool = field(
        default=False,
        metadata={
            "aliases": _with_prefix("log_roles"),
            "help": "Log how much of a tied matrix's gradient comes through its input role and how much through its "
            "output role.",
        },
    )
    untie_at: float | None = field(
        default=None,
        metadata={
            "aliases": _with_prefix("untie_at"),
            "help": "Train tied for this share of the steps, then untied. Default: tied to the end.",
        },
    )
    freeze: str | None = field(
        default=None,
        metadata={
            "aliases": _with_prefix("freeze"),
            "help": "A role that is not trained: input, source, target or output. Tied to one that is, it is untied.",
        },
    )
    freeze_until: float | None = field(
        default=None,
        metadata={
            "aliases": _with_prefix("freeze_until"),
            "help": "The share of the steps after which it is trained. Default: not before the end.",
        },
    )
    cascade: int | None = field(
        default=None,
        metadata={
            "aliases": _with_prefix("cascade"),
            "help": "Train the classifier first, in so many equal stages: in each but the first, one more group of "
            "layers is frozen from the head down, and the layers below begin again.",
        },
    )
    input_gradient_scale: float | None = field(
        default=None,
        metadata={
            "aliases": _with_prefix("input_gradient_scale"),
            "help": "A factor of the gradient that comes through the input role of a matrix, such as 5.",
        },
    )

    def to_tying_config(self) -> TyingConfig | None:
        """The declaration, or `None` if no flag declares one.

        Raises:
            TyingError: the groups file cannot be read, or `TyingConfig` refuses the declaration.
        """
        groups = _read_groups(Path(self.groups_file)) if self.groups_file else {}
        if self.scheme is None and not groups and self.loss == "stock":
            return None
        return TyingConfig(
            scheme=self.scheme,
            groups=groups,
            on_conflict=self.on_conflict,
            save_format=self.save_format,
            loss=self.loss,
        )

    def to_callback(self) -> "TyingCallback":
        """The `TyingCallback` that asserts the ties and follows the schedule in the flags.

        Raises:
            TyingError: `TyingCallback` refuses the schedule.
        """
        from .callbacks import TyingCallback

        return TyingCallback(
            log_roles=self.log_roles,
            untie_at=self.untie_at,
            freeze=self.freeze,
            freeze_until=self.freeze_until,
            cascade=self.cascade,
            input_gradient_scale=self.input_gradient_scale,
        )


@dataclass
class ObjectiveArguments:
    """Flags that choose the objective: cross entropy, the augmented loss (AL) or contrastive weight tying (CWT).

    Example:
        >>> (arguments,) = HfArgumentParser(ObjectiveArguments).parse_args_into_dataclasses()
        >>> use_tied_loss(model, objective=arguments.to_objective())
    """

    _argument_group_name = "objective"

    objective: str = field(
        default="ce",
        metadata={
            "help": "What the model is trained by: ce is cross entropy, al the augmented loss (Inan et al. 2016), cwt "
            "contrastive weight tying (Godey et al. 2023), which leaves the head untrained.",
            "choices": ["ce", "al", "cwt"],
        },
    )
    al_temperature: float = field(default=20.0, metadata={"help": "AL: tau, the temperature of both distributions."})
    al_alpha: float | None = field(default=None, metadata={"help": "AL: alpha, the factor of the divergence."})
    al_gamma: float | None = field(default=None, metadata={"help": "AL: alpha as gamma * tau, in place of al_alpha."})
    al_detach_target: bool = field(
        default=False, metadata={"help": "AL: no gradient into the embedding through the target distribution."}
    )
    cwt_negatives: str = field(
        default="batch",
        metadata={
            "help": "CWT: what a word is told from: all words of the batch as often as they stand there (batch), each "
            "of them once (unique), or those and cwt_num_sampled more of the vocabulary (sampled).",
            "choices": list(NEGATIVES),
        },
    )
    cwt_num_sampled: int | None = field(default=None, metadata={"help": "CWT: how many more words, for sampled."})
    cwt_temperature: float = field(default=1.0, metadata={"help": "CWT: what the products are divided by."})
    cwt_stop_gradient: bool = field(
        default=False, metadata={"help": "CWT: no gradient into the embeddings of the words to tell apart."}
    )
    cwt_gather: bool = field(default=False, metadata={"help": "CWT: the words of all processes, not of each alone."})

    def to_objective(self) -> Objective | None:
        """The objective for `use_tied_loss(model, objective=...)`; `None` for cross entropy.

        Raises:
            TyingError: the chosen objective refuses its options, or options of another objective are given.
        """
        for option in dataclasses.fields(self):
            owner = option.name.partition("_")[0]
            if owner not in ("objective", self.objective) and getattr(self, option.name) != option.default:
                raise TyingError(
                    f"--{option.name} is an option of --objective {owner}, and the objective is {self.objective}: "
                    f"give --objective {owner}, or leave --{option.name} out."
                )
        if self.objective == "al":
            return AugmentedObjective(self.al_temperature, self.al_alpha, self.al_gamma, self.al_detach_target)
        if self.objective == "cwt":
            return ContrastiveObjective(
                self.cwt_negatives, self.cwt_num_sampled, self.cwt_temperature, self.cwt_stop_gradient, self.cwt_gather
            )
        return None


def _read_groups(path: Path) -> dict[str, Any]:
    expected = 'Expected JSON or YAML such as {"embeddings": ["model.embed_tokens.weight", "lm_head.weight"]}.'
    return read_mapping(path, "The groups file", expected)
