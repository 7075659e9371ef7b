"""A word of one subword convention is the same word in another, and comes back unchanged."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_tying.vocabularies.conventions import convention_of, piece_of, spelled

from .two_vocabularies import ENGLISH, GERMAN, byte_level, wordpiece


@pytest.mark.parametrize(
    "one, other",
    [
        (("##ing", "##"), ("ing", "Ġ")),
        (("dog", "##"), ("Ġdog", "Ġ")),
        (("▁dog", "▁"), ("Ġdog", "Ġ")),
        (("ing", "▁"), ("##ing", "##")),
        (("▁", "▁"), ("Ġ", "Ġ")),
        (("▁Käse", "▁"), ("ĠKÃ¤se", "Ġ")),
        (("Käse", "##"), ("ĠKÃ¤se", "Ġ")),
        (("dog</w>", "</w>"), ("dog", "@@")),
        (("do", "</w>"), ("do@@", "@@")),
        (("dog", ""), ("Ġdog", "Ġ")),
    ],
)
def test_a_word_is_the_same_in_another_convention(one, other):
    assert piece_of(*one) == piece_of(*other)
    assert spelled(piece_of(*one), other[1]) == other[0]


@pytest.mark.parametrize(
    "one, other",
    [
        (("dog", "##"), ("dog", "Ġ")),
        (("##dog", "##"), ("Ġdog", "Ġ")),
        (("dog", "▁"), ("▁dog", "▁")),
        (("dog</w>", "</w>"), ("▁dog", "▁")),
        (("Ã", "Ġ"), ("##Ã", "##")),
    ],
)
def test_other_places_in_a_word_and_parts_of_a_character_are_other_words(one, other):
    assert piece_of(*one) != piece_of(*other)


@given(st.text(st.characters(codec="utf-8", exclude_characters="▁# "), min_size=1, max_size=6), st.booleans())
def test_any_text_comes_back_from_every_convention_that_marks_beginnings(text, starts):
    piece = piece_of(f"▁{text}" if starts else text, "▁")
    words = {convention: spelled(piece, convention) for convention in ("▁", "Ġ", "##")}
    assert all(piece_of(word, convention) == piece for convention, word in words.items())
    assert words["▁"] == ("▁" if starts else "") + text


def test_every_word_of_a_trained_vocabulary_comes_back_and_no_two_are_one():
    for tokenizer, mark in ((wordpiece(ENGLISH), "##"), (byte_level(GERMAN), "Ġ")):
        words = tokenizer.get_vocab()
        assert convention_of(words) == mark
        pieces = {word: piece_of(word, mark) for word in words}
        assert len(set(pieces.values())) == len(words)
        assert all(spelled(piece, mark) == word for word, piece in pieces.items())


def test_a_few_stray_marks_are_no_convention():
    words = [f"word{i}" for i in range(200)]
    assert convention_of([*words, "Ġ", "##"]) == ""
    assert convention_of([*words, "##ing", "##s", "##ed"]) == "##"
