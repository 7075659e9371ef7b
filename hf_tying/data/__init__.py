"""Corpora, tokenizers and vocabularies to train on. Nothing here needs a network."""

from .text import Corpus, blocks_for_language_modeling, corpus_from_files, standard_library_corpus
from .tokenizers import END_OF_TEXT, train_byte_level_bpe, train_joint_tokenizer

__all__ = [
    "END_OF_TEXT",
    "Corpus",
    "blocks_for_language_modeling",
    "corpus_from_files",
    "standard_library_corpus",
    "train_byte_level_bpe",
    "train_joint_tokenizer",
]
