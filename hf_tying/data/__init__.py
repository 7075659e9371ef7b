"""Corpora, tokenizers and vocabularies to train on. Nothing here needs a network."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {
    "END_OF_TEXT": "tokenizers",
    "ContiguousText": "words",
    "Corpus": "text",
    "JointTokenizer": ".vocabularies.tokenizer",
    "LabelledTexts": "labelled",
    "ParallelCorpus": "parallel",
    "blocks_for_language_modeling": "text",
    "classes_of": "labelled",
    "cldr_corpus": "cldr",
    "corpus_from_files": "text",
    "encode_parallel": "parallel",
    "encode_words": "words",
    "extend_vocabulary": ".vocabularies.extend",
    "join_vocabularies": ".vocabularies.join",
    "read_labelled_texts": "labelled",
    "read_parallel_text": "parallel",
    "read_translation_json": "parallel",
    "standard_library_corpus": "text",
    "train_byte_level_bpe": "tokenizers",
    "train_joint_tokenizer": "tokenizers",
    "train_word_level": "words",
    "train_word_tokenizer": "word_tokenizer",
}

__all__ = [
    "END_OF_TEXT",
    "ContiguousText",
    "Corpus",
    "JointTokenizer",
    "LabelledTexts",
    "ParallelCorpus",
    "blocks_for_language_modeling",
    "classes_of",
    "cldr_corpus",
    "corpus_from_files",
    "encode_parallel",
    "encode_words",
    "extend_vocabulary",
    "join_vocabularies",
    "read_labelled_texts",
    "read_parallel_text",
    "read_translation_json",
    "standard_library_corpus",
    "train_byte_level_bpe",
    "train_joint_tokenizer",
    "train_word_level",
    "train_word_tokenizer",
]

if TYPE_CHECKING:
    from ..vocabularies.extend import extend_vocabulary
    from ..vocabularies.join import join_vocabularies
    from ..vocabularies.tokenizer import JointTokenizer
    from .cldr import cldr_corpus
    from .labelled import LabelledTexts, classes_of, read_labelled_texts
    from .parallel import ParallelCorpus, encode_parallel, read_parallel_text, read_translation_json
    from .text import Corpus, blocks_for_language_modeling, corpus_from_files, standard_library_corpus
    from .tokenizers import END_OF_TEXT, train_byte_level_bpe, train_joint_tokenizer
    from .word_tokenizer import train_word_tokenizer
    from .words import ContiguousText, encode_words, train_word_level
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
