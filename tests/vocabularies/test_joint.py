"""Which words of two vocabularies become one under each rule, and the ids of a joint vocabulary."""

import pytest

from hf_tying import TyingError
from hf_tying.vocabularies.joint import JointVocabulary, join_words

from .two_vocabularies import BOS_FIRST, ENGLISH, GERMAN, PAD_FIRST, byte_level, sides, wordpiece


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
