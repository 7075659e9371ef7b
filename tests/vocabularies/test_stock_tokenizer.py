"""Marian's and FSMT's tokenizers with two vocabularies become stock tokenizers with one."""

import json
import pickle

import pytest
import torch

from hf_tying import TyingError, tie
from hf_tying.ties.vocabulary import vocabularies_of
from hf_tying.vocabularies import JointTokenizer, join_vocabularies

from ..tiny_translation import beam_count, translation_model
from .two_vocabularies import ENGLISH, GERMAN, fsmt_tokenizer, marian_tokenizer, reopened, wordpiece


def stock(kind: str, folder):
    if kind == "marian":
        pytest.importorskip("sentencepiece", reason="MarianTokenizer needs it: pip install sentencepiece")
        return marian_tokenizer(folder)
    pytest.importorskip("sacremoses", reason="FSMTTokenizer needs it: pip install sacremoses")
    return fsmt_tokenizer(folder)


def stock_model(kind: str, tokenizer):
    source, target = map(len, vocabularies_of(tokenizer))
    if kind == "fsmt":
        return translation_model(kind, target, src_vocab_size=source)
    return translation_model("marian_separate", target, vocab_size=source, eos_token_id=0, decoder_start_token_id=1)


def test_the_vocabularies_of_a_tokenizer_with_one_are_one():
    tokenizer = wordpiece(ENGLISH)
    assert vocabularies_of(tokenizer) == (tokenizer.get_vocab(), tokenizer.get_vocab())
    with pytest.raises(TyingError, match="found NoneType"):
        vocabularies_of(None)


@pytest.mark.parametrize("kind", ["marian", "fsmt"])
def test_the_vocabularies_of_a_tokenizer_with_two_are_those_of_its_files(kind, tmp_path):
    tokenizer = stock(kind, tmp_path)
    files = {"marian": ("source", "target"), "fsmt": ("vocab-src", "vocab-tgt")}[kind]
    assert vocabularies_of(tokenizer) == tuple(json.loads((tmp_path / f"{name}.json").read_text()) for name in files)


@pytest.mark.parametrize("kind", ["marian", "fsmt"])
def test_a_stock_tokenizer_with_two_vocabularies_becomes_a_stock_one_with_one(kind, tmp_path):
    tokenizer = stock(kind, tmp_path)
    model = stock_model(kind, tokenizer)
    inputs = tokenizer(ENGLISH, padding=True, return_tensors="pt")
    settings = dict(num_beams=beam_count(model, 3), max_new_tokens=10, max_length=None)
    old = model.generate(**inputs, **settings)
    texts = tokenizer.batch_decode(old, skip_special_tokens=True)
    _, target = vocabularies_of(tokenizer)
    model, joint = join_vocabularies(model, tokenizer)
    assert type(joint) is type(tokenizer) and vocabularies_of(joint) == (joint.get_vocab(), joint.get_vocab())
    assert target.items() <= joint.get_vocab().items()
    inputs = joint(ENGLISH, text_target=GERMAN, padding=True, return_tensors="pt")
    labels = inputs.pop("labels")
    new = model.generate(**inputs, **settings)
    assert torch.equal(old, new) and joint.batch_decode(new, skip_special_tokens=True) == texts
    assert labels.max() < len(target)
    assert joint.batch_decode(labels, skip_special_tokens=True) == GERMAN
    assert joint.batch_decode(inputs["input_ids"], skip_special_tokens=True) == ENGLISH
    copied = pickle.loads(pickle.dumps(joint))
    for again in (copied, reopened(joint, tmp_path / "joint")):
        assert again.get_vocab() == joint.get_vocab() and type(again) is type(joint)
        assert again(ENGLISH, text_target=GERMAN).data == joint(ENGLISH, text_target=GERMAN).data
    tie(model, "three_way", init_from="target", tokenizer=joint, target_tokenizer=joint)


def test_a_marian_whose_sides_pad_by_two_ids_pads_by_that_of_the_target(tmp_path):
    tokenizer = stock("marian", tmp_path)
    words = tokenizer.target_encoder
    words["<pad>"], words["▁d"] = words["▁d"], words["<pad>"]
    tokenizer.decoder = {index: word for word, index in words.items()}
    model, joint = join_vocabularies(stock_model("marian", tokenizer), tokenizer)
    assert joint.pad_token_id == model.config.pad_token_id == words["<pad>"] != 1
    assert joint(["a cat", ENGLISH[0]], padding=True)["input_ids"][0][-1] == words["<pad>"]
    assert joint.convert_ids_to_tokens(1) == "▁d"


def test_marian_without_overlap_splits_both_sides_by_a_joint_tokenizer(tmp_path):
    tokenizer = stock("marian", tmp_path)
    model = stock_model("marian", tokenizer)
    before = tokenizer(ENGLISH, text_target=GERMAN)
    model, joint = join_vocabularies(model, tokenizer, overlap="none")
    model.save_pretrained(tmp_path / "joint")
    for again in (joint, reopened(joint, tmp_path / "joint")):
        assert type(again) is JointTokenizer
        both = again(ENGLISH, text_target=GERMAN)
        back = again.joint.joint_to_source
        assert [[back[index] for index in row] for row in both["input_ids"]] == before["input_ids"]
        assert both["labels"] == before["labels"]
        assert again.batch_decode(both["labels"], skip_special_tokens=True) == GERMAN
        cut = again(ENGLISH[0], truncation=True, max_length=4, return_overflowing_tokens=True)
        assert [*cut["input_ids"][:-1], *cut["overflowing_tokens"]] == both["input_ids"][0][:-1]


def test_fsmt_cannot_be_the_target_of_a_joint_tokenizer(tmp_path):
    tokenizer = stock("fsmt", tmp_path)
    with pytest.raises(TyingError, match="splits text of its source side only.*overlap='word'"):
        join_vocabularies(stock_model("fsmt", tokenizer), tokenizer, overlap="none")
