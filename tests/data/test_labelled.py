"""Texts with labels in every form of file, and what is wrong with one."""

import json

import pytest

from hf_tying import TyingError
from hf_tying.data import classes_of, read_labelled_texts, train_word_tokenizer

TEXTS, LABELS = ['a "quoted" word, and more', '"so" it is'], ["x", "y"]


def written(path, suffix: str):
    file = path / f"texts{suffix}"
    if suffix == ".csv":
        rows = ["label,text"] + [
            f'{label},"{text.replace(chr(34), chr(34) * 2)}"' for text, label in zip(TEXTS, LABELS, strict=True)
        ]
        file.write_text("\n".join(rows) + "\n")
    elif suffix == ".tsv":
        file.write_text(
            "label\ttext\n" + "".join(f"{label}\t{text}\n" for text, label in zip(TEXTS, LABELS, strict=True))
        )
    else:
        rows = [{"label": label, "text": text} for text, label in zip(TEXTS, LABELS, strict=True)]
        file.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_every_form_of_file(suffix, tmp_path):
    found = read_labelled_texts(written(tmp_path, suffix))
    assert found.texts == TEXTS and found.labels == [("x",), ("y",)] and not found.several
    assert classes_of(found) == ["x", "y"] and found.class_ids(["y", "x"]) == [[1], [0]]


def test_a_quoted_tsv_and_several_labels(tmp_path):
    file = tmp_path / "a.tsv"
    file.write_text('text\tlabel\n"one\ttab"\ta; b; a\nplain\t\n')
    found = read_labelled_texts(file, separator=";")
    assert found.texts == ["one\ttab", "plain"] and found.labels == [("a", "b"), ()] and found.several
    file.write_text("text\tlabel\none\ta\ntwo\t\n")
    assert classes_of(read_labelled_texts(file, separator=";")) == ["a"]
    (tmp_path / "a.jsonl").write_text('{"text": "t", "label": [1, 2]}\n{"text": "u", "label": []}\n')
    found = read_labelled_texts(tmp_path / "a.jsonl")
    assert found.labels == [("1", "2"), ()] and found.several


@pytest.mark.parametrize("end", ["\u2028", "\x85", "\x0c", "\x1e"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_other_ends_of_a_line_are_part_of_a_text(end, suffix, tmp_path, monkeypatch):
    texts = [f"one{end}two", "three"]
    monkeypatch.setitem(globals(), "TEXTS", texts)
    assert read_labelled_texts(written(tmp_path, suffix)).texts == texts


def test_classes_of_one_number_are_in_the_same_order_in_every_process(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"t,{n}\n" for n in ("1", "001", "01", "-1")))
    assert classes_of(read_labelled_texts(tmp_path / "a.csv")) == ["-1", "001", "01", "1"]
    (tmp_path / "a.csv").write_text("text,label\nt,--1\nt,1\n")
    assert classes_of(read_labelled_texts(tmp_path / "a.csv")) == ["--1", "1"]


def test_numbers_are_in_their_own_order(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "t", "label": {n}}}\n' for n in (10, 2, 1.0)))
    assert classes_of(read_labelled_texts(tmp_path / "a.jsonl")) == ["1", "2", "10"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nfine,x\n ,y\n", "row 2: the text is ' '"),
        ("a.csv", "text,label\nfine,x\nword,\n", "row 2: the label is ''"),
        ("a.csv", "text,label\nfine,NaN\n", "row 1: the label is 'NaN'"),
        ("a.jsonl", '{"text": "t", "label": NaN}\n', "the label is nan"),
        ("a.jsonl", '{"text": "t", "label": null}\n', "the label is None"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', "the text is 3"),
        ("a.jsonl", '{"text": "t", "label": [1]}\n{"text": "t", "label": 1}\n', "lists of labels in some rows only"),
        ("a.jsonl", "text\n", "is not JSON"),
        ("a.jsonl", "[1]", "expected objects"),
        ("a.csv", "content,label\nfine,x\n", "no column 'text'; it has 'content', 'label'"),
        ("a.csv", "text,class\nfine,x\n", "no column 'label'; .* --label_column"),
        ("a.csv", "text,label\na,b,c\n", "row 1: 3 columns, expected the 2"),
        ("a.csv", "text,label\n", "has no rows"),
        pytest.param("a.csv", f"text,label\n{'a ' * 70_000},x\n", "131,072 characters needs a .jsonl", id="long"),
        ("a.csv", "", "is empty"),
        ("a.xlsx", "text", "ends in '.xlsx'"),
        ("a.txt", "text", "ends in '.txt'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_row(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(TyingError, match=message):
        read_labelled_texts(tmp_path / name)
    with pytest.raises(TyingError, match="There is no file"):
        read_labelled_texts(tmp_path / "none.csv")


def test_one_class_only_and_unknown_labels(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nfine,cat\nalso,cat\n")
    found = read_labelled_texts(tmp_path / "a.csv")
    with pytest.raises(TyingError, match="one class only \\('cat'\\)"):
        classes_of(found)
    with pytest.raises(TyingError, match="row 1: the label 'cat' is not in the training file.*'cats', 'dog'"):
        found.class_ids(["cats", "dog"])


def test_the_words_of_ordinary_text():
    tokenizer = train_word_tokenizer(["Don't go, <unk> a a <eos>", "go go"], min_frequency=2)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer))) and len(tokenizer) == 5
    assert tokenizer("go <unk> a").tokens() == ["go", "<unk>", "a", "<eos>"]
    assert train_word_tokenizer(["Ab aB"], lowercase=True)("AB b").tokens() == ["ab", "<unk>", "<eos>"]
    assert train_word_tokenizer(["கால் பந்து"])("பந்து").tokens() == ["பந்து", "<eos>"]  # marks are parts of words
    assert len(train_word_tokenizer(["a a b b c d"], vocab_size=5)) == 5
    with pytest.raises(TyingError, match="occurs 3 times"):
        train_word_tokenizer(["a b"], min_frequency=3)
