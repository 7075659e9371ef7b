"""`train_joint_tokenizer`: one vocabulary of both languages, that can write anything."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_tying import TyingError
from hf_tying.data import train_joint_tokenizer
from hf_tying.data.tokenizers import joint_tokenizer, language_token

ENGLISH = "".join(f"The weather on day {i} is better than yesterday's.\n" for i in range(40))
GERMAN = "".join(f"Das Wetter am Tag {i} ist schöner als gestern.\r\n" for i in range(40))


def write(folder, names=("train.en", "train.de")):
    for name, text in zip(names, (ENGLISH, GERMAN), strict=True):
        (folder / name).write_bytes(text.encode())
    return [folder / name for name in names]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def tokenizer(files):
    return train_joint_tokenizer(files, 400)


def test_the_special_tokens_come_first_and_then_a_token_for_each_language(tokenizer):
    first = tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4])
    assert first == ["<pad>", "<s>", "</s>", "<en>", "<de>"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4]
    assert tokenizer.convert_tokens_to_ids(language_token("de")) == 4
    assert tokenizer.unk_token is None


def test_the_vocabulary_has_words_of_both_sides_and_no_more_than_it_may(files, tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == len(vocabulary) <= 400
    assert {"ĠWetter", "Ġweather", "Das", "The"} <= set(vocabulary)
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    one_side = train_joint_tokenizer(files[:1], 400)
    assert "ĠWetter" not in one_side.get_vocab()
    assert one_side.convert_ids_to_tokens([3, 4]) != ["<en>", "<de>"]


@given(st.text())
@example("  two  spaces, a\ttab,\r\na line \x00 \x85 \u2028 end ")
@example("ﬁ ﷺ e\u0301 é 한국어 🏳️‍🌈 isn't . , ! ?")
@example("<s> not the end: </s> <en> <pad>")
@settings(max_examples=200)
def test_any_text_comes_back_as_it_was(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text + "</s>"
    assert ids[-1] == tokenizer.eos_token_id
    assert max(ids) < len(tokenizer)


def test_a_sequence_is_closed_and_a_pair_twice(tokenizer):
    plain = tokenizer("The", add_special_tokens=False)["input_ids"]
    assert tokenizer("The")["input_ids"] == [*plain, 2]
    assert tokenizer("The", "The")["input_ids"] == [*plain, 2, *plain, 2]
    assert tokenizer("The", text_target="The")["labels"] == [*plain, 2]
    batch = tokenizer(["The", "The weather"], padding=True)
    assert batch["input_ids"][0][len(plain) + 1 :] == [0] * (len(batch["input_ids"][1]) - len(plain) - 1)
    assert tokenizer.decode(batch["input_ids"][1], skip_special_tokens=True) == "The weather"


def test_it_survives_being_saved_and_loaded_by_the_auto_class(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Das Wetter <de> ist naïve 🏳️‍🌈  ."
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.all_special_ids == tokenizer.all_special_ids
    assert loaded.decode(loaded(text)["input_ids"]) == text + "</s>"


def test_the_same_sentences_give_the_same_vocabulary(files, tokenizer, tmp_path):
    again = train_joint_tokenizer([str(file) for file in files], 400)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    indented = [tmp_path / file.name for file in files]
    for before, after in zip(files, indented, strict=True):
        after.write_text("".join(f"  {line} \n" for line in before.read_text("utf-8").splitlines()), "utf-8")
    again = train_joint_tokenizer(indented, 400)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize(
    "names, languages",
    [
        (("a.txt", "b.txt"), []),
        (("a.en.txt", "a.de.txt"), ["<en>", "<de>"]),
        (("train.bpe.en", "train.pt-BR"), ["<en>", "<pt-BR>"]),
        (("x.zh_Hans", "y.raw"), ["<zh_Hans>"]),
        (("one.en", "two.en"), ["<en>"]),
        (("corpus", "news.2017"), []),
    ],
)
def test_suffixes_that_look_like_languages_get_a_token(tmp_path, names, languages):
    tokenizer = train_joint_tokenizer(write(tmp_path, names), 300)
    assert list(tokenizer.extra_special_tokens) == languages
    assert len(tokenizer.all_special_ids) == 3 + len(languages)


def test_languages_that_are_given_go_before_the_suffixes(files):
    tokenizer = train_joint_tokenizer(files, 300, languages=["nl", "af"])
    assert tokenizer.convert_ids_to_tokens([3, 4]) == ["<nl>", "<af>"]
    assert tokenizer.convert_ids_to_tokens([3]) != tokenizer("<en>")["input_ids"][:1]


def test_the_smallest_vocabulary_still_writes_anything(files):
    tokenizer = train_joint_tokenizer(files, 261)
    assert len(tokenizer) == 261
    assert tokenizer.decode(tokenizer("Wetter ☂", add_special_tokens=False)["input_ids"]) == "Wetter ☂"
    with pytest.raises(TyingError, match="260 is too small: expected at least 261.*<en>, <de>"):
        train_joint_tokenizer(files, 260)


@pytest.mark.parametrize(
    "content, message",
    [(None, "There is no file"), (b" \n", "is empty"), ("schön".encode("latin-1"), "is not UTF-8: byte 3")],
    ids=["missing", "empty", "not UTF-8"],
)
def test_a_file_that_cannot_be_read_is_named(files, tmp_path, content, message):
    bad = tmp_path / "bad.de"
    if content is not None:
        bad.write_bytes(content)
    with pytest.raises(TyingError, match=message) as error:
        train_joint_tokenizer([files[0], bad], 400)
    assert "bad.de" in str(error.value)


@pytest.mark.parametrize("nothing", [[], "train.en"])
def test_one_name_or_none_is_no_list_of_files(nothing):
    with pytest.raises(TyingError, match="expected a list of files, of both languages"):
        train_joint_tokenizer(nothing, 400)


@pytest.mark.parametrize(
    "languages, message", [(["en", "en"], "each once"), (["de", "s"], "none whose token"), ("en", "a list of codes")]
)
def test_languages_that_have_no_token_of_their_own_are_refused(languages, message):
    with pytest.raises(TyingError, match=message):
        joint_tokenizer(["text"], 400, languages)
