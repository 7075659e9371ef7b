"""Corpora, tokenizers and vocabularies to train on. Nothing here needs a network."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {
    "END_OF_TEXT": "tokenizers",
    "ContiguousText": "words",
    "Corpus": "text",
    "JointTokenizer": ".vocabularies.tokenizer",
    "ParallelCorpus": "parallel",
    "blocks_for_language_modeling": "text",
    "cldr_corpus": "cldr",
    "corpus_from_files": "text",
    "encode_parallel": "parallel",
    "encode_words": "words",
    "join_vocabularies": ".vocabularies.join",
    "read_parallel_text": "parallel",
    "read_translation_json": "parallel",
    "standard_library_corpus": "text",
    "train_byte_level_bpe": "tokenizers",
    "train_joint_tokenizer": "tokenizers",
    "train_word_level": "words",
}

__all__ = [
    "END_OF_TEXT",
    "ContiguousText",
    "Corpus",
    "JointTokenizer",
    "ParallelCorpus",
    "blocks_for_language_modeling",
    "cldr_corpus",
    "corpus_from_files",
    "encode_parallel",
    "encode_words",
    "join_vocabularies",
    "read_parallel_text",
    "read_translation_json",
    "standard_library_corpus",
    "train_byte_level_bpe",
    "train_joint_tokenizer",
    "train_word_level",
]

if TYPE_CHECKING:
    from ..vocabularies.join import join_vocabularies
    from ..vocabularies.tokenizer import JointTokenizer
    from .cldr import cldr_corpus
    from .parallel import ParallelCorpus, encode_parallel, read_parallel_text, read_translation_json
    from .text import Corpus, blocks_for_language_modeling, corpus_from_files, standard_library_corpus
    from .tokenizers import END_OF_TEXT, train_byte_level_bpe, train_joint_tokenizer
    from .words import ContiguousText, encode_words, train_word_level
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
