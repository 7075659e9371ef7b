"""`TyingArguments`: what to tie, as flags for `HfArgumentParser` beside `TrainingArguments`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import LOSSES, SCHEMES, TyingConfig, TyingError


@dataclass
class TyingArguments:
    """Flags that declare ties. None of them given leaves the model as its own config declares it."""

    scheme: str | None = field(
        default=None,
        metadata={
            "help": "The usual tie groups by name: two_way (target and output embedding, all that a causal language "
            "model has), source_target, three_way (source, target and output embedding), or none (untie). Default: "
            "what the model's config says.",
            "choices": list(SCHEMES),
        },
    )
    groups_file: str | None = field(
        default=None,
        metadata={
            "help": "JSON or YAML file with further tie groups: a mapping from a group's name to a list of parameter "
            "or module names, the first of which is the root."
        },
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Where a tied parameter starts when the group's values differ: a role (source, target, output), "
            "mean, or a parameter name. Differing values and no choice is an error: nothing is dropped unasked."
        },
    )
    on_conflict: str = field(
        default="error",
        metadata={
            "help": "What to do when a checkpoint has different values for the names of one group: error, "
            "keep_untied, or use:<parameter name>."
        },
    )
    save_format: str | None = field(
        default=None,
        metadata={
            "help": "dedup writes each group once; portable writes every name, for loaders without hf_tying. Default: "
            "dedup where the stock class re-ties these groups by itself, portable elsewhere.",
            "choices": ["dedup", "portable"],
        },
    )
    loss: str = field(
        default="stock",
        metadata={
            "help": "tied trains through the tied softmax: the same loss, computed by blocks of the vocabulary, "
            "without the logits.",
            "choices": list(LOSSES),
        },
    )
    log_roles: bool = field(
        default=False,
        metadata={
            "help": "Log how much of a tied matrix's gradient comes through its input role and how much through its "
            "output role."
        },
    )
    untie_at: float | None = field(
        default=None,
        metadata={"help": "Train tied for this share of the steps, then untied. Default: tied to the end."},
    )
    freeze: str | None = field(
        default=None,
        metadata={
            "help": "A role that is not trained: input, source, target or output. Tied to one that is, it is untied."
        },
    )
    freeze_until: float | None = field(
        default=None,
        metadata={"help": "The share of the steps after which it is trained. Default: not before the end."},
    )
    input_gradient_scale: float | None = field(
        default=None,
        metadata={"help": "A factor of the gradient that comes through the input role of a matrix, such as 5."},
    )

    def to_tying_config(self) -> TyingConfig | None:
        """The declaration, or `None` if no flag declares one.

        Raises:
            TyingError: for an unreadable groups file, and for all that `TyingConfig` refuses.
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

    def to_callback(self):
        """The `TyingCallback` that asserts the ties, and does what the flags on training say.

        Raises:
            TyingError: for what `TyingCallback` refuses.
        """
        from .callbacks import TyingCallback

        return TyingCallback(
            log_roles=self.log_roles,
            untie_at=self.untie_at,
            freeze=self.freeze,
            freeze_until=self.freeze_until,
            input_gradient_scale=self.input_gradient_scale,
        )


def _read_groups(path: Path) -> dict[str, Any]:
    way_out = 'Expected JSON or YAML such as {"embeddings": ["model.embed_tokens.weight", "lm_head.weight"]}.'
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TyingError(f"The groups file {str(path)!r} cannot be read: {error}. {way_out}") from error
    try:
        groups = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except ValueError as error:
        raise TyingError(f"The groups file {str(path)!r} cannot be parsed: {error}. {way_out}") from error
    if not isinstance(groups, dict) or not groups:
        raise TyingError(f"The groups file {str(path)!r} holds no mapping of groups. {way_out}")
    return groups


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
