"""The corpus made from CLDR: right, the same everywhere, and split so that nothing leaks and all can be learnt."""

import re
import sys

import pytest
from babel import Locale
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_tying import TyingError
from hf_tying.data.cldr import cldr_corpus
from hf_tying.data.cldr_phrases import phrases
from hf_tying.data.split import Pair, comparable, split_pairs

from ..processes import run_python

WORD = re.compile(r"[^\W\d_]+")


@pytest.fixture(scope="module")
def english_german():
    return cldr_corpus()


def words(lines):
    return {word for line in lines for word in WORD.findall(line.casefold())}


def test_the_corpus_has_thousands_of_short_lines_of_every_kind(english_german):
    train, validation = english_german
    assert 14_000 < len(train) < 20_000 and 0.04 < len(validation) / (len(train) + len(validation)) <= 0.051
    assert max(map(len, train.source + train.target)) < 120
    for pattern in (
        r"Wednesday, \w+ \d+, \d{4}",  # a day
        r"\w+ \d+, \d{4}, \d+:\d\d:\d\d [AP]M UTC",  # a moment
        r"\w{3} \d+ – \w{3} \d+, \d{4}",  # a span
        r"(1st|2nd|3rd|4th) quarter \d{4}",
        r"in \d+ weeks",
        r"\d+ minutes ago",
        r"\d+ kilometers per hour",
        r"\d+\.\d\d Swiss francs",
        r"[\d,.]+%",
        r"\d+ million",
        r"Danish \(.+\)",
        r"\w+, \w+, and \w+",
    ):
        assert any(re.fullmatch(pattern, line) for line in train.source), pattern
    assert {"Switzerland", "Swedish", "Japanese Yen"} <= set(train.source)


def test_each_line_is_the_translation_of_its_partner(english_german):
    months = dict(zip(*(list(Locale(code).months["format"]["wide"].values()) for code in ("en", "de")), strict=True))
    checked = 0
    for side in english_german:
        for source, target in zip(side.source, side.target, strict=True):
            if match := re.fullmatch(r"(\w+) (\d+), (\d{4})", source):
                if match[1] in months:
                    assert target == f"{match[2]}. {months[match[1]]} {match[3]}"
                    checked += 1
            elif match := re.fullmatch(r"([\d,.]+) kilometers", source):
                assert target == match[1].translate(str.maketrans(",.", ".,")) + " Kilometer"
                checked += 1
    assert checked > 500


@pytest.mark.parametrize("languages", [("en", "de"), ("sr_Latn", "ja")], ids="-".join)
def test_no_line_of_either_side_stands_on_both_sides_of_the_split(languages, english_german):
    train, validation = english_german if languages == ("en", "de") else cldr_corpus(*languages)
    assert (train.source_language, train.target_language) == languages
    for side in ("source", "target"):
        assert not {comparable(line) for line in getattr(train, side)} & set(
            map(comparable, getattr(validation, side))
        )
    assert len(set(map(comparable, train.source))) == len(train), "a source line has two translations"
    assert not any(line != " ".join(line.split()) for line in train.source + train.target)


def test_a_day_is_on_one_side_of_the_split_in_all_its_forms(english_german):
    train, validation = ({day for line in side.source for day in days_of(line)} for side in english_german)
    assert len(validation) > 80 and not train & validation


def days_of(line):
    """`Wednesday, March 5, 1997`, `Mar 5, 1997, 3:04:05 PM` and `March 5, 1997` are one day; spans are not asked."""
    match = re.search(r"([A-Z][a-z]{2})[a-z]* (\d+), (\d{4})", line)
    return [match.groups()] if match and "–" not in line else []


def test_every_word_to_be_written_has_been_learnt(english_german):
    train, validation = english_german
    assert len(words(validation.target)) > 300
    assert words(validation.source) <= words(train.source)
    assert words(validation.target) <= words(train.target)


def test_the_corpus_is_the_same_in_every_process_and_another_one_by_seed(english_german):
    code = "from hf_tying.data.cldr import cldr_corpus; print(*(side.fingerprint for side in cldr_corpus()))"
    elsewhere = {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    fingerprints = run_python("-c", code, environment=elsewhere).stdout.split()
    assert fingerprints == [side.fingerprint for side in english_german]
    assert {side.fingerprint for side in cldr_corpus(seed=1)}.isdisjoint(fingerprints)


@pytest.mark.parametrize(
    "languages, message",
    [
        (("en", "jp"), r"Unknown language 'jp'.*the nearest are 'ja'"),
        (("german", "en"), r"Unknown language 'german'.*the nearest are 'de'"),
        (("en", "pt-BX"), r"Unknown language 'pt-BX'.*'pt_BR'|'pt_"),
        (("", "de"), r"Unknown language ''"),
        (("en", "de;e"), r"Unknown language 'de;e'"),
        (("en", "en-GB"), r"'en' and the target language 'en_GB' are the same language"),
        (("en", "vo"), r"has too few names in 'vo': it names \d+ of \d+"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_languages_that_make_no_corpus_are_refused_with_a_way_out(languages, message):
    with pytest.raises(TyingError, match=message):
        cldr_corpus(*languages)


@pytest.mark.parametrize("fraction", [0, 1, -1])
def test_a_split_that_leaves_a_side_empty_is_refused(fraction, monkeypatch):
    short = [phrase for _, phrase in zip(range(1500), phrases(0), strict=False)]
    monkeypatch.setattr("hf_tying.data.cldr_phrases.phrases", lambda seed: [p for p in short if p.group])
    with pytest.raises(TyingError, match=f"validation_fraction={fraction} of"):
        cldr_corpus(validation_fraction=fraction)


def test_without_babel_it_is_said_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "hf_tying.data.cldr_phrases")
    monkeypatch.setitem(sys.modules, "babel", None)
    with pytest.raises(TyingError, match=r"pip install 'hf-tying\[demo\]'"):
        cldr_corpus()


def test_lines_that_differ_in_the_writing_of_numbers_alone_are_one_line():
    same = ["1,234.5 Days", "1.234,5 days", "1\u202f234,5\u00a0days", "1’234.5  DAYS", "\u200f١٬٢٣٤٫٥ days"]
    assert len(set(map(comparable, same))) == 1
    assert len(set(map(comparable, ["7 days", "8 days", "7 day", "in 7 days", "5. May 7", "57 May"]))) == 6


LINES = st.sampled_from(["a", "A", "b", "c 1,000", "c 1.000", "d", "e", "f"])


@settings(max_examples=200)
@given(st.lists(st.builds(Pair, st.sampled_from([None, "x", "y", "z"]), LINES, LINES), max_size=12), st.floats(0, 1))
def test_a_split_never_leaks_and_keeps_groups_together(pairs, fraction):
    training, validation = split_pairs(pairs, fraction)
    for side in ("source", "target"):
        seen = {comparable(getattr(pair, side)) for pair in training}
        assert not seen & {comparable(getattr(pair, side)) for pair in validation}
    assert not {pair.group for pair in training} & {pair.group for pair in validation}
    assert None not in {pair.group for pair in validation}
    sources = [comparable(pair.source) for pair in training + validation]
    assert len(sources) == len(set(sources))
    assert len(validation) <= round(fraction * len({comparable(pair.source) for pair in pairs}))
    firsts = {comparable(pair.source): pair for pair in reversed(pairs)}
    assert all(firsts[comparable(pair.source)] == pair for pair in training + validation)
