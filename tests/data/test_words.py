"""Word-level text: the vocabulary of the training file, `<eos>` on each line, contiguous pieces."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_tying import TyingError
from hf_tying.data.words import ContiguousText, encode_words, read_words, train_word_level


@pytest.fixture
def file(tmp_path):
    def write(text, name="train.txt"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_each_line_ends_in_eos_and_an_empty_one_too(file):
    assert read_words(file(" a b \n\nb c")) == ["a", "b", "<eos>", "<eos>", "b", "c", "<eos>"]
    assert read_words(file("a\u2028b\x85c\r\nd\n")) == ["a", "b", "c", "<eos>", "d", "<eos>"]


def test_the_vocabulary_is_the_training_file_by_frequency(file, tmp_path):
    path = file("b a b <unk>\nc b a\n")
    tokenizer = train_word_level(path)
    assert sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) == ["b", "<eos>", "a", "<unk>", "c"]
    assert tokenizer("c nowhere")["input_ids"] == tokenizer.convert_tokens_to_ids(["c", "<unk>", "<eos>"])
    assert tokenizer.eos_token == "<eos>"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("b a")["input_ids"] == tokenizer("b a")["input_ids"] and again.eos_token_id == 1


def test_a_file_is_what_the_tokenizer_makes_of_its_lines(file):
    path = file("b a <unk>\n\n c c b \n")
    tokenizer = train_word_level(path)
    lines = [tokenizer(line)["input_ids"] for line in path.read_text().splitlines()]
    assert encode_words(path, tokenizer).tolist() == sum(lines, [])


def test_unseen_words_without_unk_are_told_once_and_counted(file, told):
    train, valid = file("a b\n"), file("a x y x\n", "valid.txt")
    tokenizer = train_word_level(train, others=[valid])
    unseen = [message for message in told if "are not in" in message]
    assert len(unseen) == 1 and unseen[0].startswith("3 words (2 different ones")
    assert len(tokenizer) == 4  # a, b, <eos>, and <unk>
    unknown = tokenizer.unk_token_id
    assert encode_words(valid, tokenizer).tolist() == [tokenizer.get_vocab()["a"], unknown, unknown, unknown, 0]


def test_no_row_is_added_where_none_is_needed(file):
    train = file("a b\n")
    assert len(train_word_level(train, others=[file("b\n", "valid.txt")])) == 3
    known = file("a <unk>\n", "known.txt")
    tokenizer = train_word_level(known, others=[file("a x\n", "valid.txt")])
    assert sorted(tokenizer.get_vocab().values()) == [0, 1, 2]  # the text's own `<unk>`
    with pytest.raises(TyingError, match="2 words that the tokenizer does not know, such as 'x'"):
        encode_words(file("x a y\n", "test.txt"), train_word_level(train))


@pytest.mark.parametrize("content", [None, "", " \n\n", b"\xff\xfe"])
def test_a_file_that_holds_no_text_is_refused(tmp_path, content):
    path = tmp_path / "train.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TyingError, match="no file|is empty|not UTF-8"):
        train_word_level(path)


@given(st.integers(2, 200), st.integers(1, 7), st.integers(1, 9))
def test_columns_go_on_where_they_ended_and_no_word_is_lost_between_pieces(words, batch, steps):
    tokens = torch.arange(words)
    rows = words // batch
    if (rows - 1) // steps < 1:
        with pytest.raises(TyingError, match=f"expected at least {batch * (steps + 1)}"):
            ContiguousText(tokens, batch, steps)
        return
    text = ContiguousText(tokens, batch, steps)
    assert len(text) == batch * ((rows - 1) // steps)
    for column in range(batch):
        items = [text[index] for index in range(column, len(text), batch)]
        read = torch.cat([item["input_ids"] for item in items])
        expected = torch.arange(column * rows, column * rows + len(read))
        assert torch.equal(read, expected)
        assert torch.equal(torch.cat([item["shift_labels"] for item in items]), expected + 1)
        assert rows - len(read) <= steps


def test_an_index_beyond_the_text_is_an_error():
    text = ContiguousText(torch.arange(10), 2, 2)
    assert torch.equal(text[-1]["input_ids"], text[len(text) - 1]["input_ids"])
    with pytest.raises(IndexError):
        text[len(text)]
    with pytest.raises(TyingError, match="1 or more"):
        ContiguousText(torch.arange(10), 0, 2)
