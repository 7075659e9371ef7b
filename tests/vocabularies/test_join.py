"""`join_vocabularies`: ids, rows and logits of the model before and after."""

import copy

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedTokenizerFast,
)
from transformers.trainer_pt_utils import LabelSmoother

from hf_tying import tie, untie
from hf_tying.ties.anatomy import Anatomy, roles
from hf_tying.ties.slots import find_parameter
from hf_tying.ties.vocabulary import vocabularies_of
from hf_tying.vocabularies import MASK, join_vocabularies

from ..tiny_translation import VOCAB, beam_count, part_config, translation_inputs, translation_model
from .models import generated, in_joint_ids, joined, logits, model_for, rows_of
from .two_vocabularies import (
    BOS_FIRST,
    ENGLISH,
    GERMAN,
    PAD_FIRST,
    TARGET,
    byte_level,
    tokenizers_for,
    wordpiece,
)

#: Every architecture whose two sides can have two vocabularies; BART by its flag, with two matrices of equal size.
ARCHS = ["marian_separate", "fsmt", "bert2gpt2", "bert2bert", "bart"]
BY_BIAS = ["marian_separate", "bert2bert", "bart"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_logits_of_the_old_target_words_are_unchanged(arch, dtype):
    before, model, _, _, tokenizer = joined(arch, dtype)
    old, new = logits(before), logits(model, tokenizer)
    assert new.shape[-1] == tokenizer.joint.size > rows_of(arch)
    torch.testing.assert_close(new[..., : rows_of(arch)], old, rtol=0, atol=1e-6)
    assert old.std() > 0.1
    if arch in BY_BIAS:
        assert new[..., rows_of(arch) :].max() < old.min() - 50


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_search_and_beams_find_what_they_found(arch):
    before, model, _, _, tokenizer = joined(arch)
    assert torch.equal(generated(before, num_beams=1), generated(model, tokenizer, num_beams=1))
    if (count := beam_count(before, 4)) == 1:
        pytest.skip("this transformers has no beams for two vocabularies of different sizes")
    kwargs = dict(num_beams=count, return_dict_in_generate=True, output_scores=True)
    old, new = generated(before, **kwargs), generated(model, tokenizer, **kwargs)
    assert torch.equal(old.sequences, new.sequences)
    torch.testing.assert_close(old.sequences_scores, new.sequences_scores)


@pytest.mark.parametrize("arch", ARCHS)
def test_each_side_has_its_own_rows_and_the_others_for_what_it_lacks(arch):
    before, model, _, _, tokenizer = joined(arch)
    joint = tokenizer.joint
    source, target, output = (
        [find_parameter(m, roles(m)[role].name) for m in (before, model)] for role in ("source", "target", "output")
    )
    for old, new in joint.source_ids.items():
        assert torch.equal(source[1][new], source[0][old])
    lacking = [index for index in range(joint.target_size) if index not in joint.joint_to_source]
    assert lacking and torch.equal(source[1][lacking], target[0][lacking])
    for old, new in (target, output):
        assert torch.equal(new[: joint.target_size], old)
        assert torch.equal(new[joint.target_size :], source[0][joint.source_only])


@pytest.mark.parametrize("arch", ARCHS)
def test_everything_stated_beside_the_matrices_follows(arch):
    before, model, _, _, tokenizer = joined(arch)
    size = tokenizer.joint.size
    assert len(tokenizer) == tokenizer.vocab_size == size
    assert {frozenset(names) for names in Anatomy(model).tied} == {frozenset(n) for n in Anatomy(before).tied}
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.Linear):
            rows = module.num_embeddings if isinstance(module, nn.Embedding) else module.out_features
            assert rows == module.weight.shape[0]
            if getattr(module, "bias", None) is not None:
                assert module.bias.shape[0] == rows
    stated = {
        "marian_separate": ["vocab_size", "decoder_vocab_size"],
        "fsmt": ["src_vocab_size", "tgt_vocab_size"],
        "bart": ["vocab_size"],
    }
    configs = [model.config.encoder, model.config.decoder] if "2" in arch else [model.config]
    for config in configs:
        assert all(getattr(config, name) == size for name in stated.get(arch, ["vocab_size"]))
    assert vocabularies_of(tokenizer)[0]["<pad>"] == model.config.pad_token_id


def test_the_ids_that_the_encoder_states_are_those_of_its_words():
    source = wordpiece(ENGLISH, VOCAB, ["[UNK]", "[CLS]", "[SEP]", "[PAD]"])
    target = byte_level(GERMAN, TARGET, PAD_FIRST, alphabet=False)
    encoder = part_config("bert", False, pad_token_id=3, bos_token_id=1, eos_token_id=2)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, part_config("gpt2", True, TARGET))
    config.pad_token_id, config.decoder_start_token_id, config.eos_token_id = 0, 1, 2
    model = EncoderDecoderModel(config)
    model, tokenizer = join_vocabularies(model, source, target)
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("[UNK]", "[CLS]", "[SEP]")}
    assert ids["[CLS]"] >= TARGET and ids["[SEP]"] >= TARGET
    assert model.config.encoder.pad_token_id == 0  # the target's padding token: both only pad
    assert model.encoder.embeddings.word_embeddings.padding_idx == 0
    assert (model.config.encoder.bos_token_id, model.config.encoder.eos_token_id) == (ids["[CLS]"], ids["[SEP]"])
    assert (model.config.pad_token_id, model.config.decoder_start_token_id, model.config.eos_token_id) == (0, 1, 2)
    assert tokenizer(ENGLISH[0])["input_ids"][0] == ids["[CLS]"]


def test_one_padding_id_for_both_sides_moves_to_the_targets():
    source = wordpiece(ENGLISH, VOCAB, ["<unk>", "</s>", "<s>", "<pad>"])
    target = byte_level(GERMAN, TARGET, ["<s>", "</s>", "<unk>", "<mask>", "<pad>"], False)
    model = translation_model("marian_separate", TARGET, pad_token_id=3, eos_token_id=1)
    model.generation_config.pad_token_id = 3
    before = copy.deepcopy(model)
    model, tokenizer = join_vocabularies(model, source, target)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id == 4
    encoder, decoder = model.get_encoder(), model.get_decoder()
    holders = [encoder, decoder, encoder.embed_tokens, decoder.embed_tokens]
    assert [holder.padding_idx for holder in holders] == [4] * 4
    torch.testing.assert_close(logits(model, tokenizer)[..., :TARGET], logits(before))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_joined_model_is_saved_and_opened_with_the_same_logits_and_beams(arch, tmp_path):
    _, model, _, _, tokenizer = joined(arch)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))
    assert torch.equal(generated(again, tokenizer, num_beams=3), generated(model, tokenizer, num_beams=3))
    assert not hasattr(again, "tie_groups")


@pytest.mark.parametrize("arch", ARCHS)
def test_three_way_then_keeps_the_targets_rows_and_the_sources_for_its_own_words(arch, tmp_path):
    before, model, source, target, tokenizer = joined(arch)
    old = {role: find_parameter(before, roles(before)[role].name) for role in ("source", "target")}
    alone = old["source"][tokenizer.joint.source_only]
    tie(model, "three_way", init_from="target", tokenizer=tokenizer, target_tokenizer=tokenizer)
    matrices = [find_parameter(model, role.name) for role in roles(model).values()]
    assert all(matrix is matrices[0] for matrix in matrices)
    assert torch.equal(matrices[0], torch.cat([old["target"], alone]))
    inputs = translation_inputs(model)
    inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(inputs["labels"].clone())
    was = matrices[0].detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs).loss.backward()
    optimizer.step()
    assert not torch.equal(matrices[0], was)
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert len({id(find_parameter(again, role.name)) for role in roles(again).values()}) == 1
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))


@pytest.mark.parametrize("init_from", ["source", "mean"])
def test_whose_row_survives_is_the_choice_of_the_tie(init_from):
    before, model, _, _, tokenizer = joined("bert2gpt2")
    source, target = (find_parameter(before, roles(before)[role].name) for role in ("source", "target"))
    old, new = next((o, n) for o, n in tokenizer.joint.source_ids.items() if 3 < n < TARGET)
    tie(model, "three_way", init_from=init_from)
    row = find_parameter(model, roles(model)["source"].name)[new]
    expected = source[old] if init_from == "source" else (source[old] + target[new]) / 2
    torch.testing.assert_close(row, expected)


def test_a_model_tied_by_this_package_stays_tied():
    model = tie(model_for("bert2gpt2"), "two_way", init_from="target")
    source, target = tokenizers_for("bert2gpt2")
    held = find_parameter(model, roles(model)["target"].name)
    model, tokenizer = join_vocabularies(model, source, target)
    assert find_parameter(model, roles(model)["target"].name) is held
    assert find_parameter(model, roles(model)["output"].name) is held
    assert held.shape[0] == tokenizer.joint.size
    model.train()
    model(**translation_inputs(model)).loss.backward()


def test_an_output_bias_that_is_kept_twice_and_untied_has_one_size(tmp_path):
    biases = ["decoder.cls.predictions.bias", "decoder.cls.predictions.decoder.bias"]
    model = untie(model_for("bert2bert"), biases)
    model, tokenizer = join_vocabularies(model, *tokenizers_for("bert2bert"))
    first, second = (find_parameter(model, name) for name in biases)
    assert first is not second and first.shape == second.shape == (tokenizer.joint.size,)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))


@pytest.mark.parametrize("arch", ARCHS)
def test_padded_matrices_keep_the_targets_spare_rows_and_drop_the_sources(arch):
    model = model_for(arch)
    rows = rows_of(arch)
    source, target = tokenizers_for(arch, VOCAB - 6, rows - 5)
    before = copy.deepcopy(model)
    model, tokenizer = join_vocabularies(model, source, target)
    assert tokenizer.joint.target_size == rows
    assert tokenizer.joint.size == rows + len(tokenizer.joint.source_only) < rows + VOCAB - 6
    assert len(tokenizer.get_vocab()) == tokenizer.joint.size
    inputs = translation_inputs(model)
    text = source(ENGLISH[:2], padding=True, return_tensors="pt")
    joint = tokenizer(ENGLISH[:2], padding=True, return_tensors="pt")
    keys = ("input_ids", "attention_mask")
    with torch.no_grad():
        old = before(**{key: text[key] for key in keys}, decoder_input_ids=inputs["labels"].clone()).logits
        new = model(**{key: joint[key] for key in keys}, decoder_input_ids=inputs["labels"].clone()).logits
    torch.testing.assert_close(new[..., :rows], old)


def test_a_source_whose_words_the_target_all_has_adds_none():
    model = translation_model("marian_separate", TARGET)
    source = wordpiece(GERMAN, VOCAB, BOS_FIRST)
    target = wordpiece(GERMAN, TARGET, BOS_FIRST)
    assert source.get_vocab().keys() < target.get_vocab().keys()
    old = copy.deepcopy(model)
    model, tokenizer = join_vocabularies(model, source, target)
    assert tokenizer.joint.size == TARGET == model.config.vocab_size
    assert torch.equal(model.final_logits_bias, old.final_logits_bias)
    torch.testing.assert_close(logits(model, tokenizer), logits(old))


def test_a_source_with_gaps_between_its_ids_gets_the_rows_of_its_words():
    words = {word: 2 * index for index, word in enumerate([*BOS_FIRST, "the", "dog", "Hund", "red"])}
    words |= {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    names = dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    source = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    model = model_for("fsmt")
    rows = find_parameter(model, roles(model)["source"].name).detach().clone()
    model, tokenizer = join_vocabularies(model, source, tokenizers_for("fsmt")[1])
    joined_rows = find_parameter(model, roles(model)["source"].name)
    assert sorted(tokenizer.joint.source_ids) == sorted(words.values()) != list(range(8))
    for old, new in tokenizer.joint.source_ids.items():
        assert torch.equal(joined_rows[new], rows[old])


# --- the mask --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_words_of_the_source_alone_are_not_generated_until_the_mask_is_lifted(arch):
    _, model, _, _, tokenizer = joined(arch)
    first = tokenizer.joint.target_size
    output = find_parameter(model, roles(model)["output"].name)
    with torch.no_grad():
        output[:first] *= 0.01  # without a mask the other rows win now
    assert generated(model, tokenizer, num_beams=2).max() < first
    if arch in BY_BIAS:
        held = getattr(model, "final_logits_bias", None)
        bias = model.get_output_embeddings().bias.data if held is None else held
        bias[bias < MASK / 2] = 0
    else:
        assert model.generation_config.suppress_tokens == list(range(first, tokenizer.joint.size))
        model.generation_config.suppress_tokens = None
    assert generated(model, tokenizer, num_beams=2).max() >= first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", BY_BIAS)
def test_the_mask_leaves_losses_finite_also_with_label_smoothing(arch, dtype):
    _, model, _, _, tokenizer = joined(arch, dtype)
    inputs = translation_inputs(model)
    inputs["input_ids"] = in_joint_ids(inputs["input_ids"], tokenizer)
    labels = inputs["labels"].clone()
    labels[0, 0] = tokenizer.joint.size - 1  # a word of the source alone
    inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(inputs.pop("labels").clone())
    outputs = model(**inputs)
    loss = LabelSmoother(epsilon=0.1)(outputs, labels)
    loss.backward()
    assert 1 < loss.item() < 50
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert outputs.logits.isfinite().all()


def test_tokens_that_were_suppressed_before_stay_so():
    model = model_for("fsmt")
    model.generation_config.suppress_tokens = [7]
    model, tokenizer = join_vocabularies(model, *tokenizers_for("fsmt"))
    assert model.generation_config.suppress_tokens == [7, *range(TARGET, tokenizer.joint.size)]
