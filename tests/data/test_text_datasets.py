"""Text from files and folders as blocks of tokens: documents end, nothing is read twice, nothing is lost unsaid."""

import json

import pytest
from datasets import Dataset, DatasetDict

from hf_tying import TyingError
from hf_tying.data import train_byte_level_bpe
from hf_tying.data.text_datasets import (
    TextSplit,
    hold_out,
    naming_unreadable_rows,
    read_text_dataset,
    read_text_file,
    token_blocks,
)

DOCUMENTS = [f"document {i} has {i * i} words" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_level_bpe(DOCUMENTS, 300)


def write(folder, form):
    path = folder / f"text.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS)))
    elif form == "csv":
        path.write_text("text,id\n" + "".join(f"{text},{i}\n" for i, text in enumerate(DOCUMENTS)))
    elif form == "txt":
        path.write_text("\n".join(DOCUMENTS) + "\n")
    else:
        path = folder / "saved"
        data = Dataset.from_dict({"text": DOCUMENTS})
        (DatasetDict(train=data) if form == "dictionary" else data).save_to_disk(path)
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["jsonl", "csv", "folder", "dictionary"])
def test_each_row_is_a_document_that_ends(form, streaming, tmp_path, tokenizer):
    split = read_text_file("train", write(tmp_path, form), streaming=streaming)
    assert list(split.texts()) == DOCUMENTS
    blocks = list(token_blocks(split, tokenizer, 8))
    end = tokenizer.eos_token_id
    expected = [token for text in DOCUMENTS for token in (*tokenizer(text)["input_ids"], end)]
    found = [token for block in blocks for token in block["input_ids"]]
    assert found == expected[: len(found)] and len(expected) - len(found) < 8
    assert all(block["labels"] == block["input_ids"] and len(block["labels"]) == 8 for block in blocks)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_file_is_one_document_that_ends(streaming, tmp_path, tokenizer):
    path = write(tmp_path, "txt")
    expected = [*tokenizer(path.read_text())["input_ids"], tokenizer.eos_token_id]
    blocks = token_blocks(read_text_file("train", path, streaming=streaming), tokenizer, len(expected))
    assert [block["input_ids"] for block in blocks] == [expected]


def test_a_tokenizer_that_ends_a_document_is_not_helped(tmp_path):
    from hf_tying.data.tokenizers import joint_tokenizer

    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
    closing = joint_tokenizer(DOCUMENTS, 300)  # adds </s> itself
    [block] = token_blocks(read_text_file("train", tmp_path / "one.jsonl"), closing, 2)
    assert block["input_ids"][1] == closing.eos_token_id


def test_the_end_is_held_out_and_a_stream_has_none(tmp_path):
    path = write(tmp_path, "jsonl")
    train, validation = hold_out(read_text_file("train", path), 10)
    assert list(train.texts()) == DOCUMENTS[:36] and list(validation.texts()) == DOCUMENTS[36:]
    with pytest.raises(TyingError, match="0.1% of the 40 rows .* are 0"):
        hold_out(read_text_file("train", path), 0.1)
    with pytest.raises(TyingError, match="no known end to hold out"):
        hold_out(read_text_file("train", path, streaming=True), 10)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_without_text_is_named(streaming, tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "a word"}\n{"id": 1}\n')
    split = read_text_file("train", tmp_path / "a.jsonl", streaming=streaming)
    with pytest.raises(TyingError, match="None in column 'text' of row 1"):
        token_blocks(split, tokenizer, 2)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "line, message",
    [('{"text": "cut', "line 1,501 is not JSON: Unterminated"), ('{"text": 7}', "7 in column|several")],
)
def test_a_bad_row_late_in_a_file_is_one_line_that_names_it(line, message, streaming, tmp_path, tokenizer):
    path = tmp_path / "late.jsonl"
    path.write_text('{"text": "one and two"}\n' * 1500 + line + "\n" + '{"text": "three"}\n' * 1500)
    with pytest.raises(TyingError, match=message) as error, naming_unreadable_rows(path, None):
        list(token_blocks(read_text_file("train", path, streaming=streaming), tokenizer, 8))
    assert "\n" not in str(error.value)


def test_a_bad_row_of_one_of_two_files_is_not_said_to_be_in_the_first(tmp_path, tokenizer):
    files = [tmp_path / "train.csv", tmp_path / "valid.csv"]
    for file, line in zip(files, ("", "one,two,three\n"), strict=True):
        file.write_text("text\n" + "one and two\n" * 3000 + line)
    with pytest.raises(TyingError, match="train.csv' or '.*valid.csv' cannot be read"):
        with naming_unreadable_rows(*files):
            for file in files:
                list(token_blocks(read_text_file("train", file, streaming=True), tokenizer, 8))


def test_the_row_without_text_is_counted_from_the_start_of_the_data(tokenizer):
    rows = Dataset.from_dict({"text": ["one and two"] * 1500 + [None]})
    with pytest.raises(TyingError, match="None in column 'text' of row 1500"):
        token_blocks(TextSplit("train", rows, "text"), tokenizer, 8)


def test_a_text_shorter_than_a_block_is_refused(tmp_path, tokenizer):
    with pytest.raises(TyingError, match="The train text is shorter than one block of 9999 tokens"):
        token_blocks(read_text_file("train", write(tmp_path, "txt")), tokenizer, 9999)


def test_a_dataset_that_is_nowhere_is_refused_in_one_line(monkeypatch):
    with pytest.raises(TyingError, match="The dataset 'nowhere/nothing' cannot be loaded") as error:
        read_text_dataset("nowhere/nothing")
    assert "\n" not in str(error.value)
