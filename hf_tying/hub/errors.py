"""Why a folder is not published; each class has the exit code of the command line."""

from ..config import TyingError


class UnfitError(TyingError):
    """The folder or its card is not fit to be published."""

    exit_code = 1


class MissingChoice(TyingError):
    """Something that only a person can decide. The message names the argument that decides it."""

    exit_code = 4
