"""Corpora, tokenizers and vocabularies to train on. Nothing here needs a network."""

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

__all__ = [*_HOME]

__getattr__, __dir__ = lazy_names(globals(), _HOME)
