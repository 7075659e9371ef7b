"""The config of a model from scratch: a type's default or a file's, with the changes of `--config_overrides`.

Configs compute some of their fields from others: the width of a head, the kinds of layers, the layers of a decoder. So
changes are given to the constructor, and never set on a config that has done its sums.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Collection
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ..config import TyingError, nearest

# These register the model types of this package with the Auto classes.
from ..models import encoder_decoder, lstm  # noqa: F401

_TRUE, _FALSE, _NONE = ("true", "1", "y", "yes"), ("false", "0", "n", "no"), ("null", "none")


def config_with_overrides(make: Callable[..., PreTrainedConfig], overrides: str | None) -> PreTrainedConfig:
    """Make a config with the values that `--config_overrides` gives to its constructor.

    Args:
        make: makes the config; takes fields as keywords, which go before its own.
        overrides: such as `"hidden_size=64,num_hidden_layers=2"`. A value that begins with `[`, `{` or `"` is JSON:
            `'layer_types=["full_attention","full_attention"]'`. `None` for no changes.

    Raises:
        TyingError: for text of another form, a field that the config does not have, and a value that the constructor
            refuses or replaces.
    """
    default = make()
    if not overrides:
        return default
    given = {key: _typed(key, value, getattr(default, key, None)) for key, value in parse_overrides(overrides).items()}
    known = _fields(default)
    for key in given:
        if key not in known:
            raise TyingError(
                f"--config_overrides: key {key!r} is not in the config of {default.model_type!r}{nearest(key, known)}."
            )
    # By the name that the constructor computes from: T5's num_hidden_layers is num_layers there.
    names = {key: default.attribute_map.get(key, key) for key in given}
    if len(set(names.values())) < len(names):
        raise TyingError(f"--config_overrides: {', '.join(given)} name one field twice. Give it once.")
    try:
        config = make(**{names[key]: value for key, value in given.items()})
    except TyingError:
        raise
    except Exception as error:  # a constructor may raise anything for sizes that it cannot have
        raise TyingError(f"--config_overrides {overrides}: {' '.join(str(error).split())}") from error
    for key, value in given.items():
        found = getattr(config, key)
        if (
            value is not None
            and found != value
            and not (isinstance(found, PreTrainedConfig) and isinstance(value, dict))
        ):
            raise TyingError(
                f"--config_overrides: the config of {default.model_type!r} makes {key}={found!r} of {key}={value!r}, "
                f"since it computes {key} from other fields. Leave it out, and set those."
            )
    return config


def parse_overrides(text: str) -> dict[str, Any]:
    """Split `name=value,name=value`; a value in brackets or quotation marks is read as JSON, another stays text.

    Raises:
        TyingError: for text of another form, and for a name that comes twice.
    """
    found: dict[str, Any] = {}
    rest = text.strip().removesuffix(",")
    while rest:
        key, equals, rest = rest.partition("=")
        key, rest = key.strip(), rest.lstrip()
        if not equals or not key.isidentifier():
            raise TyingError(f"--config_overrides: {key!r} is not of the form name=value, in {text!r}.")
        if rest.startswith(("[", "{", '"')):
            try:
                value, end = json.JSONDecoder().raw_decode(rest)
            except ValueError as error:
                raise TyingError(f"--config_overrides: the value of {key} is not JSON ({error}): {rest!r}.") from None
            after, comma, rest = rest[end:].partition(",")
            if after.strip():
                raise TyingError(f"--config_overrides: expected a comma after the value of {key}, found {after!r}.")
        else:
            value, _, rest = rest.partition(",")
            value = value.strip()
        if key in found:
            raise TyingError(f"--config_overrides: {key} is given twice.")
        found[key], rest = value, rest.lstrip()
    return found


def type_config(model_type: str, auto_class: type, types: Collection[str], **fields: Any) -> PreTrainedConfig:
    """The default config of a model type, with some fields given to its constructor.

    Args:
        model_type: such as `"llama"`.
        auto_class: such as `AutoModelForCausalLM`; it must have a model of this type.
        types: names to suggest for one that is unknown.
        fields: of the config.

    Raises:
        TyingError: for a type without such a model, with the nearest names; and for one whose config holds another
            config for the text, which `fields` would not reach.
    """
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in auto_class._model_mapping:
        raise TyingError(
            f"--model_type {model_type}: transformers has no {auto_class.__name__} of it{nearest(model_type, types)}."
        )
    config = AutoConfig.for_model(model_type, **fields)
    text = config.get_text_config()
    if text is not config and not config.is_encoder_decoder:
        raise TyingError(
            f"--model_type {model_type} is a model of text and more: expected a type of text alone"
            f"{f', such as {text.model_type}' if text.model_type in types else ''}."
        )
    return config


def refuse_positions(config: PreTrainedConfig, block_size: int) -> None:
    """Raise `TyingError` for sequences of more tokens than the model has positions."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < block_size:
        raise TyingError(
            f"--block_size {block_size} is more than the {positions} positions of this {config.model_type}: give "
            f"{positions} at most, or from scratch --config_overrides max_position_embeddings={block_size}."
        )


def maker_from(config: PreTrainedConfig) -> Callable[..., PreTrainedConfig]:
    """A function that makes a loaded config again with changed fields, and with what follows from them.

    A file has all fields, the computed ones too. Those that the constructor computes again from the others are left to
    it: with `head_dim` = `hidden_size` / `num_attention_heads` in the file, a change of `hidden_size` changes both.
    """
    kept = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "transformers_version")}
    for key in list(kept):
        without = {name: value for name, value in kept.items() if name != key}
        try:
            again = type(config)(**without)
        except Exception:  # a constructor may raise anything when it lacks a field
            continue
        if again.to_dict() == config.to_dict():
            kept = without
    return lambda **changes: type(config)(**kept | changes)


def _fields(config: PreTrainedConfig) -> set[str]:
    cls = type(config)
    declared = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    return declared | {*config.to_dict(), *config.attribute_map, *inspect.signature(cls).parameters}


def _typed(key: str, value: Any, default: Any) -> Any:
    """The text of a value as what the default is: a truth value, text, or what JSON reads in it."""
    if not isinstance(value, str):
        return value
    lower = value.lower()
    if isinstance(default, bool):
        if lower not in _TRUE + _FALSE:
            raise TyingError(f"--config_overrides: {key} is {value!r}: expected true or false.")
        return lower in _TRUE
    if lower in _NONE:
        return None
    if isinstance(default, str):
        return value
    try:
        number = json.loads(lower)
    except ValueError:
        return value
    return float(number) if isinstance(default, float) and isinstance(number, int) else number
