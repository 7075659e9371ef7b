"""Joins of two vocabularies: their words (`joint`), the tokenizer (`tokenizer`) and a trained model (`join`)."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {
    "JointTokenizer": "tokenizer",
    "JointVocabulary": "joint",
    "MASK": "rows",
    "extend_vocabulary": "extend",
    "join_vocabularies": "join",
}

__all__ = [
    "JointTokenizer",
    "JointVocabulary",
    "MASK",
    "extend_vocabulary",
    "join_vocabularies",
]

if TYPE_CHECKING:
    from .extend import extend_vocabulary
    from .join import join_vocabularies
    from .joint import JointVocabulary
    from .rows import MASK
    from .tokenizer import JointTokenizer
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
