"""Parallel text: what is read, how it is refused, and the token ids that a model trains on."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import MBartTokenizer
from transformers.utils import logging

from hf_tying import TyingError
from hf_tying.data import train_byte_level_bpe
from hf_tying.data.parallel import ParallelCorpus, encode_parallel, read_parallel_text, read_translation_json
from hf_tying.data.tokenizers import joint_tokenizer

ENGLISH = ["Two dogs run.", "A cat sleeps on a warm stone wall.", "We eat."]
GERMAN = ["Zwei Hunde laufen.", "Eine Katze schläft auf einer warmen Steinmauer.", "Wir essen."]


def write(folder, english: bytes, german: bytes, names=("train.en", "train.de")):
    (folder / names[0]).write_bytes(english)
    (folder / names[1]).write_bytes(german)
    return folder / names[0], folder / names[1]


@pytest.fixture
def corpus():
    return ParallelCorpus(ENGLISH, GERMAN, "en", "de")


@pytest.fixture(scope="module")
def tokenizer():
    return joint_tokenizer([*ENGLISH, *GERMAN] * 3, 330, ["en", "de"])


def test_two_text_files_are_read_pair_by_pair(tmp_path, corpus):
    files = write(tmp_path, "\n".join(ENGLISH).encode(), ("\n".join(GERMAN) + "\n").encode())
    assert read_parallel_text(*files) == corpus
    assert len(read_parallel_text(*files)) == 3


def test_a_windows_file_with_a_byte_order_mark_reads_the_same(tmp_path, corpus):
    files = write(tmp_path, "\r\n".join(ENGLISH).encode("utf-8-sig"), ("\r\n".join(GERMAN) + "\r\n").encode())
    assert read_parallel_text(*files) == corpus


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r\ufeff"), min_size=1), min_size=1))
@example(["one\u2028two", "three\x0bfour\x85five", "six\x1cseven"])
@settings(max_examples=50)
def test_nothing_but_a_line_feed_moves_one_side_against_the_other(tmp_path_factory, sentences):
    sentences = [sentence.strip() or "x" for sentence in sentences]
    numbers = [str(i) for i in range(len(sentences))]
    folder = tmp_path_factory.mktemp("text")
    files = write(folder, ("\n".join(sentences) + "\n").encode(), "\n".join(numbers).encode())
    read = read_parallel_text(*files)
    assert read.source == sentences
    assert read.target == numbers


@pytest.mark.parametrize(
    "names, languages",
    [
        (("a.en", "a.de"), ("en", "de")),
        (("a.en.txt", "a.pt-BR.txt"), ("en", "pt-BR")),
        (("train.tok.en", "b.zh_Hans"), ("en", "zh_Hans")),
    ],
)
def test_the_suffix_tells_the_language(tmp_path, names, languages):
    read = read_parallel_text(*write(tmp_path, b"a", b"b", names))
    assert (read.source_language, read.target_language) == languages


def test_a_language_that_is_given_goes_before_the_suffix(tmp_path):
    files = write(tmp_path, b"a", b"b", ("source.txt", "b.de"))
    read = read_parallel_text(*files, source_language="nl")
    assert (read.source_language, read.target_language) == ("nl", "de")
    with pytest.raises(TyingError, match=r"source\.txt' does not tell its language.*source_language"):
        read_parallel_text(*files)


@pytest.mark.parametrize(
    "english, german, message",
    [
        (b"a\nb\nc\n", b"a\nb\n", r"train\.en' has 3 lines and .*train\.de' has 2.*de' ends after line 2"),
        (b"a\n   \nc\n", b"a\nb\nc\n", r"Line 2 of .*train\.en' is only spaces"),
        (b"a\nb\nc\n", b"a\nb\n\n", r"Line 3 of .*train\.de' is only spaces"),
        (b"a\n", b"", r"train\.de' is empty"),
        (b" \n \n", b"a\nb\n", r"train\.en' is empty"),
        (b"a\n", "ä\n".encode("latin-1"), r"train\.de' is not UTF-8: byte 0 is 0xe4.*iconv"),
        (None, b"a\n", r"There is no file .*train\.en'"),
    ],
    ids=["unequal", "spaces", "empty line", "empty", "only spaces", "not UTF-8", "missing"],
)
def test_text_that_is_not_parallel_is_refused_by_file_and_line(tmp_path, english, german, message):
    files = write(tmp_path, english or b"", german)
    if english is None:
        files[0].unlink()
    with pytest.raises(TyingError, match=message):
        read_parallel_text(*files)


def test_json_lines_are_read_in_the_form_of_transformers(tmp_path, corpus):
    rows = [
        {"translation": {"fr": "?", "de": g, "en": f" {e}"}, "id": 1} for e, g in zip(ENGLISH, GERMAN, strict=True)
    ]
    file = tmp_path / "train.json"
    file.write_text("".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)), "utf-8")
    assert read_translation_json(file, "en", "de") == corpus


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"translation": {"en": "a"}}', "has no 'de'; it has 'en'"),
        ('{"translation": {}}', "has no 'en'; it has none"),
        ('{"translation": ["a", "b"]}', "is no translation"),
        ('{"en": "a", "de": "b"}', "is no translation"),
        ('["a", "b"]', "is no translation"),
        ('{"translation": {"en": "a", "de": 5}}', "The 'de' on .* is int"),
        ('{"translation": {"en": null, "de": "b"}}', "The 'en' on .* is NoneType"),
        ('{"translation": {"en": "a", "de": " \\u2028 "}}', "The 'de' on .* is only spaces"),
        (r'{"translation": {"en": "a", "de": "b\ud800"}}', "half of a surrogate pair"),
        ('{"translation": {"en": "a", "de": "b"}', "is no JSON"),
        ("[" * 100_000, "is no JSON.*no list around"),
        (" ", "is only spaces"),
    ],
)
def test_json_that_is_no_pair_is_refused_by_line(tmp_path, line, message):
    file = tmp_path / "Train.json"
    file.write_text('{"translation": {"en": "a", "de": "b"}}\n' + line + "\n", "utf-8")
    with pytest.raises(TyingError, match=message) as error:
        read_translation_json(file, "en", "de")
    assert "ine 2 of" in str(error.value) and str(file) in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "source, target, message",
    [
        (["a", "b"], ["c"], "2 source and 1 target"),
        ([], [], "no sentences"),
        (["a", "b"], ["c", " \t"], "Sentence 1 of the target side is only spaces"),
    ],
)
def test_a_corpus_holds_pairs_or_is_not_made(source, target, message):
    with pytest.raises(TyingError, match=message):
        ParallelCorpus(source, target, "en", "de")


def test_equal_corpora_have_equal_fingerprints_and_others_do_not(corpus):
    others = [
        ParallelCorpus(GERMAN, ENGLISH, "de", "en"),
        ParallelCorpus(GERMAN, ENGLISH, "en", "de"),
        ParallelCorpus(ENGLISH, GERMAN, "en", "nl"),
        ParallelCorpus(ENGLISH[:2], GERMAN[:2], "en", "de"),
        ParallelCorpus([*ENGLISH[:2], ENGLISH[2] + " "], GERMAN, "en", "de"),
    ]
    prints = {other.fingerprint for other in (corpus, *others)}
    assert len(prints) == 6 and all(len(one) == 16 for one in prints)
    assert ParallelCorpus(list(ENGLISH), list(GERMAN), "en", "de").fingerprint == corpus.fingerprint


def test_ids_decode_to_the_sentences_and_end_with_the_end_token(corpus, tokenizer, told):
    rows = encode_parallel(corpus, tokenizer)
    assert rows.column_names == ["input_ids", "attention_mask", "labels"]
    assert [tokenizer.decode(ids) for ids in rows["input_ids"]] == [text + "</s>" for text in ENGLISH]
    assert [tokenizer.decode(ids) for ids in rows["labels"]] == [text + "</s>" for text in GERMAN]
    assert [set(mask) for mask in rows["attention_mask"]] == [{1}] * 3
    assert [len(mask) for mask in rows["attention_mask"]] == [len(ids) for ids in rows["input_ids"]]
    assert told == []


def test_long_sentences_are_cut_before_the_end_token_with_one_warning_that_counts(corpus, tokenizer, told):
    whole = encode_parallel(corpus, tokenizer)
    most = {"input_ids": 5, "labels": 6}
    cut = encode_parallel(corpus, tokenizer, max_source_length=5, max_target_length=6)
    for column, length in most.items():
        for before, after in zip(whole[column], cut[column], strict=True):
            assert after == (before if len(before) <= length else [*before[: length - 1], tokenizer.eos_token_id])
    source, target = (sum(len(ids) > most[column] for ids in whole[column]) for column in most)
    assert 0 < source and 0 < target
    [warning] = told
    assert f"Of 3 pairs, {source} source sentences to 5 tokens and {target} target sentences to 6" in warning


def test_a_sentence_of_just_the_most_tokens_is_not_cut(corpus, tokenizer, told):
    longest = max(len(ids) for ids in encode_parallel(corpus, tokenizer)["labels"])
    encode_parallel(corpus, tokenizer, max_target_length=longest)
    assert told == []


def test_each_side_has_its_own_tokenizer_and_an_unclosed_target_is_closed(corpus, tokenizer):
    other = train_byte_level_bpe(GERMAN, 280)  # as GPT-2's, it closes nothing
    rows = encode_parallel(corpus, tokenizer, other, max_target_length=8)
    assert [tokenizer.decode(ids) for ids in rows["input_ids"]] == [text + "</s>" for text in ENGLISH]
    for text, ids in zip(GERMAN, rows["labels"], strict=True):
        assert ids == [*other(text)["input_ids"][:7], other.eos_token_id]
    # On the source side nothing has to stop.
    assert encode_parallel(corpus, other, tokenizer)["input_ids"][0] == other(ENGLISH[0])["input_ids"]


def test_language_codes_stay_where_the_tokenizer_puts_them(corpus):
    tokenizer = MBartTokenizer(src_lang="en_XX", tgt_lang="de_DE")
    rows = encode_parallel(corpus, tokenizer, max_source_length=5, max_target_length=4)
    end = tokenizer.eos_token_id
    for column, length, code in (("input_ids", 5, "en_XX"), ("labels", 4, "de_DE")):
        assert [ids[-2:] for ids in rows[column]] == [[end, tokenizer.convert_tokens_to_ids(code)]] * 3
        assert max(map(len, rows[column])) == length


@pytest.mark.parametrize("lengths, side", [((1, 9), "en"), ((9, 1), "de"), ((9, 0), "de")])
def test_a_maximum_without_room_for_a_word_is_refused(corpus, tokenizer, lengths, side):
    with pytest.raises(TyingError, match=rf"sentence \({side}\) are too few: expected at least 2"):
        encode_parallel(corpus, tokenizer, max_source_length=lengths[0], max_target_length=lengths[1])


@pytest.mark.parametrize("progress, shown", [(True, True), (False, False)])
def test_the_progress_bar_counts_the_sentences_of_both_sides(corpus, tokenizer, progress, shown, capsys):
    logging.enable_progress_bar()
    try:
        encode_parallel(corpus, tokenizer, progress=progress)
    finally:
        logging.disable_progress_bar()
    assert ("6/6" in capsys.readouterr().err) == shown
