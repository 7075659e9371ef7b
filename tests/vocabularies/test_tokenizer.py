"""`JointTokenizer` splits, decodes, pads and is saved as its two tokenizers are, in ids of one vocabulary."""

import copy
import json
import pickle

import pytest
from transformers import AutoTokenizer

from hf_tying import TyingError
from hf_tying.ties.vocabulary import vocabularies_of
from hf_tying.vocabularies.joint import join_words
from hf_tying.vocabularies.tokenizer import JointTokenizer, tokenizer_over

from .two_vocabularies import ENGLISH, GERMAN, byte_level, reopened, sides, wordpiece

PAIRS = {
    "wordpiece to byte-level": lambda: (wordpiece(ENGLISH), byte_level(GERMAN)),
    "byte-level to wordpiece": lambda: (byte_level(ENGLISH), wordpiece(GERMAN, 110)),
    "wordpiece to wordpiece": lambda: (wordpiece(ENGLISH), wordpiece(GERMAN, 110)),
}


def pair_and_joint(pair="wordpiece to byte-level", overlap="word"):
    source, target = PAIRS[pair]()
    joint = join_words(*sides(source, target), len(target), overlap)
    return source, target, tokenizer_over(joint, source, target, overlap)


@pytest.fixture
def joint_tokenizer():
    return pair_and_joint()[-1]


@pytest.mark.parametrize("overlap", ["word", "spelling", "none"])
@pytest.mark.parametrize("pair", PAIRS)
def test_each_side_is_split_as_by_its_own_tokenizer(pair, overlap):
    source, target, tokenizer = pair_and_joint(pair, overlap)
    both = tokenizer(ENGLISH, text_target=GERMAN)
    assert isinstance(tokenizer, JointTokenizer)
    assert both["labels"] == target(GERMAN)["input_ids"]
    back = tokenizer.joint.joint_to_source
    assert [[back[index] for index in row] for row in both["input_ids"]] == source(ENGLISH)["input_ids"]
    assert tokenizer(text_target=GERMAN)["input_ids"] == both["labels"]
    assert tokenizer(ENGLISH)["input_ids"] == both["input_ids"]  # back in the mode for input


@pytest.mark.parametrize("overlap", ["word", "spelling", "none"])
@pytest.mark.parametrize("pair", PAIRS)
def test_both_sides_decode_as_by_their_own_tokenizers(pair, overlap):
    source, target, tokenizer = pair_and_joint(pair, overlap)
    for skip in (True, False):
        texts = tokenizer.batch_decode(tokenizer(text_target=GERMAN)["input_ids"], skip_special_tokens=skip)
        assert texts == target.batch_decode(target(GERMAN)["input_ids"], skip_special_tokens=skip)
    texts = tokenizer.batch_decode(tokenizer(ENGLISH, padding=True)["input_ids"], skip_special_tokens=True)
    assert texts == source.batch_decode(source(ENGLISH)["input_ids"], skip_special_tokens=True)


def test_words_of_both_sides_in_one_text_are_written_by_the_targets_convention():
    source, target, tokenizer = pair_and_joint()
    ids = tokenizer(ENGLISH[0], add_special_tokens=False)["input_ids"]
    mixed = [*tokenizer(text_target=GERMAN[1], add_special_tokens=False)["input_ids"], *ids]
    assert not all(index < len(target) for index in ids)
    assert not all(index in tokenizer.joint.joint_to_source for index in mixed)
    assert tokenizer.decode(mixed) == f"{GERMAN[1]} the dog is running home ."
    assert tokenizer.decode([*mixed, tokenizer.cls_token_id], skip_special_tokens=True) == tokenizer.decode(mixed)


def test_the_vocabulary_names_every_row_once(joint_tokenizer):
    vocabulary = joint_tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(joint_tokenizer))) == list(range(joint_tokenizer.joint.size))
    assert joint_tokenizer.convert_ids_to_tokens(range(len(vocabulary))) == sorted(vocabulary, key=vocabulary.get)
    assert vocabularies_of(joint_tokenizer) == (vocabulary, vocabulary)
    assert joint_tokenizer.tokenize("the dogs") == ["Ġthe", "Ġdog", "s"]
    assert joint_tokenizer.target_tokenizer.get_vocab().items() <= vocabulary.items()


def test_a_name_that_another_word_has_is_marked():
    *_, tokenizer = pair_and_joint(overlap="none")
    assert {"Ġis", "is", "ing", "##ing"} <= tokenizer.get_vocab().keys()
    alike = wordpiece(ENGLISH)
    joint = join_words(*sides(alike, alike), len(alike), "none")
    twice = JointTokenizer(alike, copy.deepcopy(alike), joint)
    assert {"the", "the (source)", "##ing", "##ing (source)"} <= twice.get_vocab().keys()
    assert len(twice.get_vocab()) == joint.size
    both = [twice.convert_tokens_to_ids(word) for word in ("the", "##ing (source)", "the (source)")]
    assert len(set(both)) == 3 and twice.decode(both) == "theing the"  # the mark is for the name alone


def test_special_tokens_are_those_of_the_target_and_padding_that_of_the_source():
    source, target, tokenizer = pair_and_joint()
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (target.eos_token_id, target.bos_token_id)
    assert tokenizer.pad_token == "<pad>"  # one for both sides
    assert (tokenizer.cls_token, tokenizer.sep_token) == ("[CLS]", "[SEP]")
    assert set(tokenizer.all_special_tokens) == {"<|endoftext|>", "<pad>", "[CLS]", "[SEP]", "[UNK]"}
    target.pad_token, target.model_max_length = target.eos_token, 16
    apart = JointTokenizer(source, target, join_words(*sides(source, target), len(target), "word"))
    assert apart.model_max_length == 16  # of 32 and 16
    assert apart.pad_token == "[PAD]" and apart.pad_token_id >= len(target)
    padded = apart(["the", "the red house"], padding=True)["input_ids"]
    assert padded[0][-1] == apart.pad_token_id
    assert apart.batch_decode(padded, skip_special_tokens=True) == ["the", "the red house"]


def test_padding_and_truncation_are_those_of_any_tokenizer(joint_tokenizer):
    tokenizer = joint_tokenizer
    batch = tokenizer(ENGLISH, text_target=GERMAN, padding=True, truncation=True, max_length=6, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (7, 6)
    assert batch["labels"].shape == (7, 6)
    assert (batch["input_ids"][:, -1] == tokenizer.sep_token_id).tolist() == batch["attention_mask"].all(1).tolist()
    assert len(tokenizer(ENGLISH[0], padding="max_length", max_length=20)["input_ids"]) == 20
    assert tokenizer(ENGLISH[0], return_tensors="pt")["input_ids"].shape == (1, 8)
    assert len(tokenizer(ENGLISH[:2], padding=True, pad_to_multiple_of=16)["input_ids"][0]) == 16
    lengths = tokenizer(ENGLISH[0], text_target=GERMAN[0], max_length=5, max_target_length=3, truncation=True)
    assert (len(lengths["input_ids"]), len(lengths["labels"])) == (5, 3)
    left = tokenizer(ENGLISH[:2], padding="max_length", max_length=12, padding_side="left")["attention_mask"]
    assert left[0] == [0] * 4 + [1] * 8
    parts = tokenizer(ENGLISH[0], truncation=True, max_length=6, return_overflowing_tokens=True)["input_ids"]
    words = [word for part in parts for word in tokenizer.convert_ids_to_tokens(part) if word[0] == "Ġ"]
    assert len(parts) == 2 and words == tokenizer.tokenize(ENGLISH[0])
    tokenizer.truncation_side = "left"
    ids = tokenizer(ENGLISH[0], truncation=True, max_length=4)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "Ġhome", "Ġ.", "[SEP]"]
    assert tokenizer(["the", "dog"], is_split_into_words=True)["input_ids"] == tokenizer("the dog")["input_ids"]
    assert tokenizer.model_max_length == 32 and tokenizer.num_special_tokens_to_add() == 2
    assert tokenizer.encode("the dog") == tokenizer("the dog")["input_ids"]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_saved_one_is_opened_by_autotokenizer_and_is_the_same(pair, tmp_path):
    *_, tokenizer = pair_and_joint(pair)
    tokenizer.padding_side = "left"
    again = reopened(tokenizer, tmp_path)
    assert type(again) is JointTokenizer and again.joint == tokenizer.joint
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.all_special_ids == tokenizer.all_special_ids
    one, other = (t(ENGLISH, text_target=GERMAN, padding=True).data for t in (tokenizer, again))
    assert one == other and again.padding_side == "left" and again.model_max_length == 32
    assert again.batch_decode(one["labels"]) == tokenizer.batch_decode(one["labels"])
    assert reopened(again, tmp_path / "twice").get_vocab() == tokenizer.get_vocab()
    for side in ("source_tokenizer", "target_tokenizer"):
        alone = AutoTokenizer.from_pretrained(tmp_path / side)
        assert alone.get_vocab() == getattr(tokenizer, side).get_vocab()


def test_it_travels_to_other_processes_and_is_copied(joint_tokenizer):
    for copied in (pickle.loads(pickle.dumps(joint_tokenizer)), copy.deepcopy(joint_tokenizer)):
        assert copied(ENGLISH, text_target=GERMAN).data == joint_tokenizer(ENGLISH, text_target=GERMAN).data


def test_tokenizers_that_change_afterwards_change_nothing_in_it():
    source, target, tokenizer = pair_and_joint()
    before = tokenizer(ENGLISH, text_target=GERMAN).data
    source.add_tokens(["dog is"])
    target.add_tokens(["Hund läuft"])
    assert source(ENGLISH)["input_ids"] != wordpiece(ENGLISH)(ENGLISH)["input_ids"]
    assert tokenizer(ENGLISH, text_target=GERMAN).data == before


def test_no_code_of_a_checkpoint_is_run(joint_tokenizer, tmp_path):
    joint_tokenizer.save_pretrained(tmp_path)
    side = tmp_path / "target_tokenizer"
    (side / "evil.py").write_text("raise SystemExit('run')")
    settings = json.loads((side / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (side / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="trust_remote_code"):
        JointTokenizer.from_pretrained(tmp_path, trust_remote_code=True)


def test_what_cannot_be_done_with_a_joint_vocabulary_is_said(joint_tokenizer):
    with pytest.raises(TyingError, match="Cannot add '<new>'.*before join_vocabularies"):
        joint_tokenizer.add_tokens(["<new>"])
    for wrong in (-100, joint_tokenizer.vocab_size):
        with pytest.raises(TyingError, match=f"{wrong} is not an id.*-100 of labels"):
            joint_tokenizer.decode([0, wrong])
    with pytest.raises(TyingError, match="call the tokenizer on a text"):
        joint_tokenizer.build_inputs_with_special_tokens([1, 2])
    with pytest.raises(TyingError, match="made of two"):
        JointTokenizer(joint_tokenizer.source_tokenizer)
    assert joint_tokenizer.convert_tokens_to_ids("no such word") == joint_tokenizer.unk_token_id


@pytest.mark.parametrize(
    "content, match",
    [
        ("", "is not a joint vocabulary"),
        ("[1]", "is not a joint vocabulary"),
        ("{}", "is not a joint vocabulary"),
        ('{"version": 2, "target_size": 1, "source_ids": [0]}', "has version 2.*Upgrade"),
        ('{"version": 1, "target_size": -1, "source_ids": [0]}', r"numbers from 0\."),
        ('{"version": 1, "target_size": 330, "source_ids": ["a"]}', r"numbers from 0\."),
        ('{"version": 1, "target_size": 330, "source_ids": {"0": 1}}', r"numbers from 0\."),
        ('{"version": 1, "target_size": 99999999999, "source_ids": [0]}', "no vocabulary has more than"),
        ('{"version": 1, "target_size": 330, "source_ids": [0, 0]}', "each once"),
        ('{"version": 1, "target_size": 330, "source_ids": [0, 1]}', "88 source words without an id"),
        ('{"version": 1, "target_size": 3, "source_ids": [0, 1]}', "327 target words beyond row 2"),
        (None, "without its ids.*joint_vocabulary.json"),
    ],
)
def test_a_broken_file_is_named(joint_tokenizer, tmp_path, content, match):
    joint_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "joint_vocabulary.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(TyingError, match=match):
        JointTokenizer.from_pretrained(tmp_path)
