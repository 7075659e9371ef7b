"""Two vocabularies become one: the words (`joint`), the tokenizer (`tokenizer`) and a trained model (`join`)."""

from .._lazy import lazy_names

_HOME = {
    "JointTokenizer": "tokenizer",
    "JointVocabulary": "joint",
    "MASK": "rows",
    "join_vocabularies": "join",
}

__all__ = [*_HOME]

__getattr__, __dir__ = lazy_names(globals(), _HOME)
