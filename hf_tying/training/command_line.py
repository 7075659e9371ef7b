"""The flags of a training script: from the command line, from a JSON or YAML file, or from both."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from ..config import TyingError, nearest


class ScriptParser(HfArgumentParser):
    """`HfArgumentParser` whose refusals are one `TyingError`, and in whose files a flag has the type of the flag.

    `script.py flags.yaml --learning_rate 1e-4`: a flag beside a file overrides it. What stands in the file is read as
    if it stood on the command line, so that YAML's `1e-3`, which is text there, is a number here.
    Names may have dashes or underscores.

    Args:
        dataclass_types: the argument classes, such as `TrainingArguments`.

    Example:
        >>> model_args, training_args = ScriptParser((ModelArguments, TrainingArguments)).parse()
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs: Any) -> None:
        super().__init__(dataclass_types, **kwargs)
        # Any prefix of a flag would be the flag: an unknown one could be taken for another.
        self.allow_abbrev = False

    def parse(self, arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
        """One instance of each argument class.

        Args:
            arguments: the command line without the script's name; by default that of the process.

        Raises:
            TyingError: for an unknown flag, with the nearest names; a value that the flag cannot have; a file that
                cannot be read; and all that the argument classes refuse.
        """
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        if arguments and Path(arguments[0]).suffix in (".json", ".yaml", ".yml"):
            self._set_defaults_from(Path(arguments.pop(0)))
        try:
            *parsed, unknown = self.parse_args_into_dataclasses(
                arguments, return_remaining_strings=True, look_for_args_file=False
            )
        except TyingError:
            raise
        except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
            raise TyingError(" ".join(str(error).split())) from error
        if unknown:
            self._refuse(unknown[0], "")
        return tuple(parsed)

    def error(self, message: str) -> NoReturn:
        raise TyingError(message)

    def _set_defaults_from(self, file: Path) -> None:
        for key, value in _mapping(file).items():
            action = self._option_string_actions.get(f"--{str(key).replace('-', '_')}")
            if action is None:
                self._refuse(f"--{key}", f" in {str(file)!r}")
            action.required = False
            if isinstance(value, str | int | float) and (action.type is not None or not isinstance(value, bool)):
                value = self._get_values_of(action, str(value), file)
            self.set_defaults(**{action.dest: value})

    def _get_values_of(self, action: argparse.Action, text: str, file: Path) -> Any:
        try:
            value = action.type(text) if action.type else text
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            expected = getattr(action.type, "__name__", "value").replace("string_to_bool", "true or false")
            raise TyingError(f"--{action.dest} {text!r} in {str(file)!r}: expected {expected}.") from None
        if action.choices is not None and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise TyingError(f"--{action.dest} {text!r} in {str(file)!r}: expected one of {choices}.")
        return [value] if action.nargs == "+" else value

    def _refuse(self, flag: str, where: str) -> NoReturn:
        name = flag.partition("=")[0]
        if not name.startswith("-"):
            raise TyingError(f"{flag!r}{where} belongs to no flag: expected --name value, after one file at most.")
        known = [option for option in self._option_string_actions if "-" not in option.strip("-")]
        raise TyingError(f"Unknown flag {name}{where}{nearest(name, known)}.")


@contextmanager
def naming(flags: str) -> Iterator[None]:
    """Turn what transformers says about a wrong value into one line that names the flags, a `TyingError`."""
    try:
        yield
    except TyingError:
        raise
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        raise TyingError(f"{flags}: {' '.join(str(error).split())}") from error


def _mapping(file: Path) -> dict[str, Any]:
    """The flags in a JSON or YAML file."""
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else _yaml(text)
    except (OSError, ValueError) as error:
        raise TyingError(f"The flags in {str(file)!r} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(found, dict):
        raise TyingError(f"{str(file)!r} has no flags: expected a mapping such as {{model_type: llama}}.")
    return found


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
