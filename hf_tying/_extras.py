"""Libraries that come with an extra of the package, asked for before any work is done that needs them."""

from importlib import import_module
from types import ModuleType

from .config import TyingError


class MissingLibraryError(TyingError, ImportError):
    """A library of an extra cannot be imported. The command line shows it as a message, Python as an import error."""


def require(module: str, purpose: str, extra: str) -> ModuleType:
    """Import a library of an extra.

    Args:
        module: the module to import.
        purpose: the beginning of the message, such as `"A picture"`.
        extra: the extra of this package that brings the library.

    Returns:
        The module.

    Raises:
        MissingLibraryError: the library is missing or broken. The message has the command that installs it.
    """
    library = module.partition(".")[0]
    try:
        import_module(library)
        return import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == library
        found = "is missing" if missing else f"cannot be imported ({error})"
        raise MissingLibraryError(
            f"{purpose} needs {library}, which {found}: pip install 'hf-tying[{extra}]'."
        ) from error
