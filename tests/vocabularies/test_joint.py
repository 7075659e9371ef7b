"""The words of two vocabularies, and tokenizers over the joint one, from a text to the text that a model generates."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hf_tying import TyingError, tie
from hf_tying.ties.vocabulary import vocabularies_of
from hf_tying.vocabularies.join import join_vocabularies
from hf_tying.vocabularies.joint import JointVocabulary, Side, convention_of, join_words, piece_of, spelled
from hf_tying.vocabularies.tokenizer import JointTokenizer, register, tokenizer_over

from ..tiny_translation import part_config, translation_model
from ..two_vocabularies import (
    BOS_FIRST,
    ENGLISH,
    GERMAN,
    PAD_FIRST,
    byte_level,
    fsmt_tokenizer,
    marian_tokenizer,
    wordpiece,
)

# --- the words -------------------------------------------------------------------------------------------------------


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


def sides(source, target):
    return Side(source, vocabularies_of(source)[0]), Side(target, vocabularies_of(target)[1])


@pytest.mark.parametrize("overlap", ["word", "spelling", "none"])
def test_target_words_keep_their_ids_and_the_others_follow_in_order(overlap):
    source, target = sides(wordpiece(ENGLISH), byte_level(GERMAN))
    joint = join_words(source, target, 340, overlap)
    alone = [joint.source_ids[index] for index in joint.source_only]
    assert joint.source_only == sorted(joint.source_only)
    assert alone == list(range(340, joint.size))
    assert len(set(joint.source_ids.values())) == len(source.words)
    for index, new in joint.source_ids.items():
        if new < 340 and source.words[index] not in source.whole:
            if overlap == "word":
                assert source.piece(index) == target.piece(new)
            else:
                assert overlap == "spelling" and source.words[index] == target.words[new]


def test_each_rule_joins_what_it_says():
    source, target = sides(wordpiece(ENGLISH), byte_level(GERMAN))
    found = {}
    for overlap in ("word", "spelling", "none"):
        joint = join_words(source, target, 330, overlap)
        found[overlap] = {source.words[i]: target.words[j] for i, j in joint.source_ids.items() if j < 330}
    assert found["word"]["##ing"] == "ing" and found["word"]["is"] == "Ġis" and "i" not in found["word"]
    assert found["spelling"]["i"] == "i" and "##ing" not in found["spelling"]
    assert found["none"] == {"[PAD]": "<pad>"}


def test_special_tokens_are_one_by_spelling_or_by_all_their_roles():
    def found(source, target):
        source, target = sides(source, target)
        joint = join_words(source, target, max(target.words) + 1, "none")
        return {source.words[i]: target.words[j] for i, j in joint.source_ids.items() if j in target.words}

    # GPT-2's one token begins, ends and stands for the unknown: none of BERT's is that.
    assert found(wordpiece(ENGLISH), byte_level(GERMAN)) == {"[PAD]": "<pad>"}
    assert found(wordpiece(ENGLISH), wordpiece(GERMAN)) == {w: w for w in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")}
    named = wordpiece(ENGLISH, special=PAD_FIRST)
    assert found(named, byte_level(GERMAN, special=BOS_FIRST)) == {word: word for word in PAD_FIRST}
    # A namesake goes before a token of the same role, and one token is one other token only.
    twice = byte_level(GERMAN, special=["[PAD]", "<s>", "</s>", "<unk>", "<pad>"])
    twice.add_special_tokens({"extra_special_tokens": ["[PAD]"]})
    assert twice.pad_token == "<pad>"
    assert found(wordpiece(ENGLISH), twice) == {"[PAD]": "[PAD]", "[UNK]": "<unk>"}
    assert found(twice, wordpiece(GERMAN)) == {"[PAD]": "[PAD]", "<unk>": "[UNK]"}


def test_a_wrong_mapping_is_no_joint_vocabulary():
    for ids in ({0: 1, 1: 1}, {0: 5, 1: 7}, {0: 6}):
        with pytest.raises(TyingError, match="each once.*without a gap"):
            JointVocabulary(5, ids)
    assert JointVocabulary(5, {0: 5, 1: 2, 2: 6}).source_only == [0, 2]


# --- JointTokenizer --------------------------------------------------------------------------------------------------


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


def reopened(tokenizer, folder):
    register()
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


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
        with pytest.raises(TyingError, match=f"{wrong} is no id.*-100 of labels"):
            joint_tokenizer.decode([0, wrong])
    with pytest.raises(TyingError, match="call the tokenizer on a text"):
        joint_tokenizer.build_inputs_with_special_tokens([1, 2])
    with pytest.raises(TyingError, match="made of two"):
        JointTokenizer(joint_tokenizer.source_tokenizer)
    assert joint_tokenizer.convert_tokens_to_ids("no such word") == joint_tokenizer.unk_token_id


@pytest.mark.parametrize(
    "content, match",
    [
        ("", "is no joint vocabulary"),
        ("[1]", "is no joint vocabulary"),
        ("{}", "is no joint vocabulary"),
        ('{"version": 2, "target_size": 1, "source_ids": [0]}', "has version 2.*Upgrade"),
        ('{"version": 1, "target_size": -1, "source_ids": [0]}', "numbers from 0 on"),
        ('{"version": 1, "target_size": 330, "source_ids": ["a"]}', "numbers from 0 on"),
        ('{"version": 1, "target_size": 330, "source_ids": {"0": 1}}', "numbers from 0 on"),
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


# --- stock tokenizers with two vocabularies --------------------------------------------------------------------------


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
    settings = dict(num_beams=3, max_new_tokens=10, max_length=None)
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


# --- from a text to a text -------------------------------------------------------------------------------------------


def untrained(kind: str, source, target) -> EncoderDecoderModel:
    encoder = part_config("bert", False, len(source), pad_token_id=source.pad_token_id)
    family = kind.removeprefix("bert2")
    decoder = part_config(family, True, len(target), pad_token_id=target.pad_token_id)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    ends = (target.bos_token_id, target.eos_token_id) if family == "gpt2" else (2, 3)  # [CLS], [SEP]
    config.pad_token_id, (config.decoder_start_token_id, config.eos_token_id) = target.pad_token_id, ends
    torch.manual_seed(0)
    return EncoderDecoderModel(config)


def english(tokenizer) -> dict:
    return tokenizer(ENGLISH, padding=True, return_tensors="pt", return_token_type_ids=False).data


def german(tokenizer) -> torch.Tensor:
    labels = tokenizer(text_target=GERMAN, padding=True, return_tensors="pt")
    return labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)


def learn(model, inputs, labels, steps: int) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    starts = model.prepare_decoder_input_ids_from_labels(labels)
    for _ in range(steps):
        scores = model(**inputs, decoder_input_ids=starts).logits
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return loss.item()


def translated(model, tokenizer, beams: int) -> torch.Tensor:
    return model.generate(**english(tokenizer), num_beams=beams, max_new_tokens=24)


@pytest.mark.parametrize("kind", ["bert2gpt2", "bert2bert"])
def test_a_trained_model_translates_as_before_and_is_tied_trained_on_and_reopened(kind, tmp_path):
    source = wordpiece(ENGLISH)
    target = byte_level(GERMAN) if kind == "bert2gpt2" else wordpiece(GERMAN, 110)
    model = untrained(kind, source, target)
    learn(model, english(source), german(target), steps=120)
    old = {n: target.batch_decode(translated(model, source, n), skip_special_tokens=True) for n in (1, 3)}
    expected = target.batch_decode(target(GERMAN)["input_ids"], skip_special_tokens=True)
    assert sum(a == b for a, b in zip(old[1], expected, strict=True)) >= 4  # it has learnt something
    model, tokenizer = join_vocabularies(model, source, target)
    for beams, texts in old.items():
        assert tokenizer.batch_decode(translated(model, tokenizer, beams), skip_special_tokens=True) == texts
    tie(model, "three_way", init_from="target", tokenizer=tokenizer, target_tokenizer=tokenizer)
    assert learn(model, english(tokenizer), german(tokenizer), steps=20) < 1
    model.save_pretrained(tmp_path)
    again, words = AutoModelForSeq2SeqLM.from_pretrained(tmp_path), reopened(tokenizer, tmp_path)
    assert any(len(group.names) >= 3 for group in again.tie_groups)
    assert torch.equal(translated(again, words, 3), translated(model, tokenizer, 3))


def test_a_seq2seq_trainer_takes_a_joint_tokenizer(tmp_path):
    source, target = wordpiece(ENGLISH), byte_level(GERMAN)
    model, tokenizer = join_vocabularies(untrained("bert2gpt2", source, target), source, target)
    tie(model, "three_way", init_from="target")
    data = [dict(tokenizer(e, text_target=g)) for e, g in zip(ENGLISH, GERMAN, strict=True)]
    texts = []

    def read(predicted) -> dict:
        labels = torch.tensor(predicted.label_ids)
        labels = labels.masked_fill(labels == -100, tokenizer.pad_token_id)
        texts.extend(tokenizer.batch_decode(labels, skip_special_tokens=True))
        return {"lines": len(tokenizer.batch_decode(predicted.predictions, skip_special_tokens=True))}

    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=2, save_steps=2, predict_with_generate=True,
        generation_max_length=8, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model), compute_metrics=read,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_lines"] == len(texts) == len(ENGLISH)
    assert texts == GERMAN
    register()
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint-2").get_vocab() == tokenizer.get_vocab()
