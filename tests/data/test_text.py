"""The corpus, its split, the tokenizer and the blocks."""

from collections import Counter, defaultdict

import pytest

from hf_tying import TyingError
from hf_tying.data import (
    END_OF_TEXT,
    blocks_for_language_modeling,
    corpus_from_files,
    standard_library_corpus,
    train_byte_level_bpe,
)
from hf_tying.data import text as text_module
from hf_tying.data.text import _docstrings, _language_reference

from ..processes import run_python


@pytest.fixture(scope="module")
def documents():
    """What the corpus of the library is made of: the files are read once."""
    return [*_language_reference(), *_docstrings()]


@pytest.fixture(scope="module")
def library(documents):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "_language_reference", lambda: documents)
        patch.setattr(text_module, "_docstrings", lambda: [])
        return standard_library_corpus()


def paragraphs(texts):
    return [" ".join(part.split()).casefold() for text in texts for part in text.split("\n\n") if part.strip()]


def words(number, start=0):
    return " ".join(f"word{i}" for i in range(start, start + number))


def test_the_library_gives_megabytes_of_real_text(library):
    assert sum(map(len, library.train)) > 1_000_000
    joined = "\n".join(library.train + library.validation)
    assert "The `for` statement" in joined or 'The "for" statement' in joined  # the language reference
    assert "Return a new" in joined  # docstrings


def test_no_paragraph_of_the_library_stands_on_both_sides_or_twice(library):
    train, validation = paragraphs(library.train), paragraphs(library.validation)
    assert len(validation) > 100
    assert not set(train) & set(validation)
    assert len(train) == len(set(train)) and len(validation) == len(set(validation))


def test_a_module_and_its_pure_python_twin_stand_on_one_side(library, documents):
    first_group, files = {}, Counter()
    for document in documents:
        files[document.group] += 1
        for paragraph in paragraphs([document.text]):
            first_group.setdefault(paragraph, document.group)
    assert files["library/io"] == 2  # io.py and _pyio.py
    sides = defaultdict(set)
    for side, texts in (("train", library.train), ("validation", library.validation)):
        for paragraph in paragraphs(texts):
            sides[first_group[paragraph]].add(side)
    assert "library/io" in sides and len(sides) > 200
    assert [group for group, found in sides.items() if len(found) > 1] == []


def test_the_held_out_share_is_close_to_what_was_asked(library):
    validation = sum(map(len, library.validation))
    share = validation / (validation + sum(map(len, library.train)))
    assert 0.045 < share <= 0.05


def test_modules_are_read_and_not_run_and_in_the_same_order_in_every_process(library):
    code = (
        "import sys; from hf_tying.data import standard_library_corpus; print(standard_library_corpus().fingerprint)\n"
        "assert not {'this', 'antigravity', 'turtle', 'idlelib', 'sqlite3', 'curses'} & set(sys.modules)"
    )
    printed = run_python("-c", code, environment={"PYTHONHASHSEED": "7"}).stdout
    assert printed.strip() == library.fingerprint  # and nothing else: `import this` would print


def test_the_end_of_a_file_is_held_out_at_a_paragraph(tmp_path):
    text = "\n\n".join(words(25, start) + "\n" + words(25, start + 25) for start in range(0, 5000, 50))
    (tmp_path / "a.txt").write_text(text)
    corpus = corpus_from_files([tmp_path / "a.txt"], validation_fraction=0.1)
    assert corpus.train[0] + "\n\n" + corpus.validation[0] == text
    assert 0.05 < len(corpus.validation[0]) / len(text) <= 0.1


@pytest.mark.parametrize("separator", ["\n", " "], ids=["only lines", "one long line"])
def test_a_file_without_paragraphs_is_cut_at_a_line_or_a_word(tmp_path, separator):
    text = separator.join(f"word{i}" for i in range(2000))
    (tmp_path / "a.txt").write_text(text)
    corpus = corpus_from_files([tmp_path / "a.txt"])
    assert corpus.train[0] + separator + corpus.validation[0] == text


def test_a_held_out_paragraph_that_was_trained_on_is_dropped(tmp_path):
    unique = [words(50, start) for start in range(0, 5000, 50)]
    unique[-2] = unique[0].upper()
    (tmp_path / "a.txt").write_text("\n\n".join(unique))
    corpus = corpus_from_files([tmp_path / "a.txt"], validation_fraction=0.1)
    assert unique[-1] in corpus.validation[0]
    assert unique[-2] not in corpus.validation[0]
    assert not set(paragraphs(corpus.train)) & set(paragraphs(corpus.validation))


def test_bad_files_are_refused_by_name_and_with_a_way_out(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "same.txt").write_text("\n\n".join(["again and again"] * 400))
    for name, expected in (
        ("missing.txt", "no file .*missing.txt"),
        ("empty.txt", "empty.txt' is empty"),
        ("latin.txt", "latin.txt' is not UTF-8: byte 2 is 0xef.*iconv"),
        ("same.txt", "Nothing is left to validate on.*same.txt"),
        (".", "cannot be read"),
    ):
        with pytest.raises(TyingError, match=expected):
            corpus_from_files([tmp_path / name])


def test_the_tokenizer_writes_any_text_back_and_stays_within_its_size():
    tokenizer = train_byte_level_bpe([words(500)], vocab_size=300)
    assert len(tokenizer) <= 300
    for text in ("word1 word2", "日本語 🤗\t\n", "\x00"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == END_OF_TEXT and tokenizer.eos_token_id == 0


def test_training_the_tokenizer_twice_gives_the_same(library):
    first, second = (train_byte_level_bpe(library.validation, vocab_size=1000).get_vocab() for _ in range(2))
    assert first == second and len(first) == 1000


def test_a_vocabulary_that_cannot_hold_every_byte_is_refused():
    with pytest.raises(TyingError, match="256 is too small: expected at least 257"):
        train_byte_level_bpe(["a"], vocab_size=256)


def test_blocks_are_the_documents_in_order_each_closed():
    tokenizer = train_byte_level_bpe(["a b c"], vocab_size=257)
    blocks = blocks_for_language_modeling(["abc", "de", "fgh"], tokenizer, block_size=4)
    assert [tokenizer.decode(block) for block in blocks["input_ids"]] == ["abc" + END_OF_TEXT, f"de{END_OF_TEXT}f"]
    assert blocks["labels"][:] == blocks["input_ids"][:]


def test_text_shorter_than_a_block_is_refused():
    tokenizer = train_byte_level_bpe(["a"], vocab_size=257)
    with pytest.raises(TyingError, match="4 tokens, less than one block of 8"):
        blocks_for_language_modeling(["abc"], tokenizer, block_size=8)
