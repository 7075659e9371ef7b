"""Ties of a model inside a stock model become ties of the outer model, and its config records them, before a save."""

from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..config import TyingConfig
from .modeling import TiedModelMixin
from .slots import canonical
from .tying import tie

logger = logging.get_logger(__name__)


def adopt_inner_ties(model: PreTrainedModel) -> bool:
    """Make the ties of the models inside `model` ties of `model`, by its own names, and record them in its config.

    `tie(model.language_model, ...)` cannot see the outer model. A stock outer model would leave names out of its file,
    and its config would not name them for a loader to fill.

    Args:
        model: model that is about to be saved.

    Returns:
        Whether there were such ties. If so, `model` has `TiedModelMixin` in front of its class.

    Raises:
        TyingError: where a tie inside is broken, or cannot be recorded; nothing is changed.
    """
    if isinstance(model, TiedModelMixin):
        return False
    groups: dict[str, list[str]] = {}
    known: set[str] = set()
    for prefix, sub in model.named_modules():
        for group in vars(sub).get("tie_groups", ()) if prefix else ():
            names = [f"{canonical(prefix)}.{name}" for name in group.names]
            if not known & set(names):  # the name of a group is that of the outermost model
                known |= set(names)
                groups[next(n for n in (group.name, *names) if n not in groups)] = names
    if not groups:
        return False
    logger.warning(
        f"{type(model).__name__} is saved with the ties of a model inside it: they are its own from now on, and are "
        "recorded in its config."
    )
    tie(model, TyingConfig(groups=groups))
    return True
