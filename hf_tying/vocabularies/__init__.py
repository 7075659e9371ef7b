"""Two vocabularies become one: their words, their tokenizer, and the model over them."""

from .._lazy import lazy_names

_HOME = {
    "JointTokenizer": "tokenizer",
    "JointVocabulary": "joint",
    "join_vocabularies": "join",
}

__all__ = [*_HOME]

__getattr__, __dir__ = lazy_names(globals(), _HOME)
