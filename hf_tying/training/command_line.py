"""The flags of a training script: from the command line, from a JSON or YAML file, or from both."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from ..config import TyingError, nearest
from .flag_files import read_mapping


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """`--help` that keeps the lines of the description, shows one spelling of a flag, and no default that is none."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = action.option_strings
        action.option_strings = [one for one in spellings if "-" not in one.strip("-")][:1] or spellings
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = spellings

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ScriptParser(HfArgumentParser):
    """`HfArgumentParser` whose refusals are one `TyingError`, and in whose files a flag has the type of the flag.

    In `script.py flags.yaml --learning_rate 1e-4`, the flag overrides the file. A value in the file is read as on the
    command line, so YAML's `1e-3`, which YAML takes for text, is a number. Names may have dashes or underscores.

    Args:
        dataclass_types: argument classes, such as `TrainingArguments`. `--help` has a part for each class that has a
            title (`_argument_group_name`); the flags of the others, which are transformers' own, come last.
        **kwargs: keywords of `HfArgumentParser`.

    Example:
        >>> model_args, training_args = ScriptParser((ModelArguments, TrainingArguments)).parse()
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs: Any) -> None:
        kwargs = {
            "formatter_class": HelpFormatter,
            "usage": "%(prog)s [FLAGS.json | FLAGS.yaml] [--FLAG VALUE ...]",
        } | kwargs
        super().__init__(dataclass_types, **kwargs)
        if not all(hasattr(one, "_argument_group_name") for one in self.dataclass_types):
            self._optionals.title = "training, by transformers"
        self._action_groups.sort(key=lambda group: group is self._optionals)
        # Any prefix of a flag would be the flag: an unknown one could be taken for another.
        self.allow_abbrev = False

    def parse(self, arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Parse a command line.

        Args:
            arguments: command line without the script's name. Default: that of the process.

        Returns:
            One instance of each argument class.

        Raises:
            TyingError: if a flag is unknown (with the nearest names), a value does not fit its flag, a file cannot be
                read, or an argument class refuses a value.
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
        """Raise a `TyingError`, where `argparse` ends the process."""
        raise TyingError(message)

    def _set_defaults_from(self, file: Path) -> None:
        expected = "Expected flags such as {model_type: llama}."
        for key, value in read_mapping(file, "The file of flags", expected).items():
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
