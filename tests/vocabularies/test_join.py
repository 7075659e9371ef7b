"""`join_vocabularies`: ids, rows and logits of the model before and after, and what is refused."""

import copy

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BertForMaskedLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GenerationConfig,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from transformers.testing_utils import CaptureLogger
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import logging

from hf_tying import TyingError, tie, untie
from hf_tying.ties.groups import roles
from hf_tying.ties.slots import actual_groups, find_parameter
from hf_tying.ties.vocabulary import vocabularies_of
from hf_tying.vocabularies.join import MASK, join_vocabularies
from hf_tying.vocabularies.tokenizer import JointTokenizer

from ..tiny_translation import VOCAB, part_config, shake, translation_inputs, translation_model
from ..two_vocabularies import (
    BOS_FIRST,
    ENGLISH,
    GERMAN,
    PAD_FIRST,
    TARGET,
    byte_level,
    marian_tokenizer,
    tokenizers_for,
    wordpiece,
)

#: Every architecture whose two sides can have two vocabularies; BART by its flag, with two matrices of equal size.
ARCHS = ["marian_separate", "fsmt", "bert2gpt2", "bert2bert", "bart"]
BY_BIAS = ["marian_separate", "bert2bert", "bart"]


def model_for(arch: str, dtype=torch.float32):
    changes = {"tie_word_embeddings": False} if arch == "bart" else {}
    model = translation_model(arch, target_vocab=VOCAB if arch == "bart" else TARGET, **changes)
    return model.to(dtype).eval()


def rows_of(arch: str) -> int:
    return VOCAB if arch == "bart" else TARGET


def joined(arch: str, dtype=torch.float32, **kwargs):
    """A joined model beside one as it was, and the tokenizers of all."""
    model = model_for(arch, dtype)
    source, target = tokenizers_for(arch, target_rows=rows_of(arch))
    before = copy.deepcopy(model)
    model, tokenizer = join_vocabularies(model, source, target, **kwargs)
    return before, model, source, target, tokenizer


def in_joint_ids(ids: torch.Tensor, tokenizer: JointTokenizer) -> torch.Tensor:
    return ids.clone().apply_(lambda index: tokenizer.joint.source_ids[index])


def logits(model, tokenizer: JointTokenizer | None = None) -> torch.Tensor:
    inputs = translation_inputs(model)
    inputs["decoder_input_ids"] = inputs.pop("labels")
    if tokenizer is not None:
        inputs["input_ids"] = in_joint_ids(inputs["input_ids"], tokenizer)
    with torch.no_grad():
        return model(**inputs).logits.float()


def generated(model, tokenizer: JointTokenizer | None = None, **kwargs) -> torch.Tensor:
    inputs = translation_inputs(model)
    del inputs["labels"]
    if tokenizer is not None:
        inputs["input_ids"] = in_joint_ids(inputs["input_ids"], tokenizer)
    return model.generate(**inputs, max_new_tokens=8, max_length=None, do_sample=False, **kwargs)


# --- the model -------------------------------------------------------------------------------------------------------


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
    kwargs = dict(num_beams=4, return_dict_in_generate=True, output_scores=True)
    old, new = generated(before, **kwargs), generated(model, tokenizer, **kwargs)
    assert torch.equal(old.sequences, new.sequences)
    torch.testing.assert_close(old.sequences_scores, new.sequences_scores)


@pytest.mark.parametrize("arch", ARCHS)
def test_each_side_has_its_own_rows_and_the_others_for_what_it_lacks(arch):
    before, model, _, _, tokenizer = joined(arch)
    joint = tokenizer.joint
    source, target, output = (
        [find_parameter(m, roles(m)[role][-1]) for m in (before, model)] for role in ("source", "target", "output")
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
    assert {frozenset(names) for names in actual_groups(model)} == {frozenset(n) for n in actual_groups(before)}
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
    old = {role: find_parameter(before, roles(before)[role][-1]) for role in ("source", "target")}
    alone = old["source"][tokenizer.joint.source_only]
    tie(model, "three_way", init_from="target", tokenizer=tokenizer, target_tokenizer=tokenizer)
    matrices = [find_parameter(model, names[-1]) for names in roles(model).values()]
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
    assert len({id(find_parameter(again, names[-1])) for names in roles(again).values()}) == 1
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))


@pytest.mark.parametrize("init_from", ["source", "mean"])
def test_whose_row_survives_is_the_choice_of_the_tie(init_from):
    before, model, _, _, tokenizer = joined("bert2gpt2")
    source, target = (find_parameter(before, roles(before)[role][-1]) for role in ("source", "target"))
    old, new = next((o, n) for o, n in tokenizer.joint.source_ids.items() if 3 < n < TARGET)
    tie(model, "three_way", init_from=init_from)
    row = find_parameter(model, roles(model)["source"][-1])[new]
    expected = source[old] if init_from == "source" else (source[old] + target[new]) / 2
    torch.testing.assert_close(row, expected)


def test_a_model_tied_by_this_package_stays_tied():
    model = tie(model_for("bert2gpt2"), "two_way", init_from="target")
    source, target = tokenizers_for("bert2gpt2")
    held = find_parameter(model, roles(model)["target"][-1])
    model, tokenizer = join_vocabularies(model, source, target)
    assert find_parameter(model, roles(model)["target"][-1]) is held
    assert find_parameter(model, roles(model)["output"][-1]) is held
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
    rows = find_parameter(model, roles(model)["source"][-1]).detach().clone()
    model, tokenizer = join_vocabularies(model, source, tokenizers_for("fsmt")[1])
    joined_rows = find_parameter(model, roles(model)["source"][-1])
    assert sorted(tokenizer.joint.source_ids) == sorted(words.values()) != list(range(8))
    for old, new in tokenizer.joint.source_ids.items():
        assert torch.equal(joined_rows[new], rows[old])


# --- the mask --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_words_of_the_source_alone_are_not_generated_until_the_mask_is_lifted(arch):
    _, model, _, _, tokenizer = joined(arch)
    first = tokenizer.joint.target_size
    output = find_parameter(model, roles(model)["output"][-1])
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


# --- what is refused -------------------------------------------------------------------------------------------------


def state_of(model) -> tuple:
    return (
        {name: (tensor.shape, tensor.clone()) for name, tensor in model.state_dict().items() if not tensor.is_meta},
        model.config.to_dict(),
        getattr(model, "generation_config", None) and model.generation_config.to_dict(),
        {frozenset(names) for names in actual_groups(model)},
    )


def refused(model, source, target, match: str, **kwargs) -> None:
    """The error has this text, and nothing is changed."""
    before = state_of(model)
    with pytest.raises(TyingError, match=match):
        join_vocabularies(model, source, target, **kwargs)
    after = state_of(model)
    assert before[1:] == after[1:] and before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name][1], after[0][name][1]) for name in before[0])


def joined_model(encoder, decoder) -> EncoderDecoderModel:
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.pad_token_id, config.decoder_start_token_id, config.eos_token_id = 0, 1, 2
    return shake(EncoderDecoderModel(config))


@pytest.mark.parametrize("overlap, hint", [("words", "nearest names are 'word'"), (None, "None"), ("", "''")])
def test_an_unknown_rule_is_refused(overlap, hint):
    source, target = tokenizers_for("bart", target_rows=VOCAB)
    for second in (target, source):  # also where there is nothing to join
        refused(model_for("bart"), source, second, f"Unknown overlap rule.*{hint}", overlap=overlap)


@pytest.mark.parametrize("side", ["source", "target"])
def test_more_words_than_rows_are_refused(side):
    source, target = tokenizers_for("bert2gpt2", VOCAB + (side == "source"), TARGET + (side == "target"))
    refused(model_for("bert2gpt2"), source, target, f"The {side} tokenizer has .* words up to id .*resize the model")


def test_hidden_sizes_that_differ_are_refused():
    model = joined_model(part_config("bert", False, hidden_size=32), part_config("gpt2", True, TARGET, n_embd=16))
    refused(model, *tokenizers_for("bert2gpt2"), r"\(64, 32\).*\(80, 16\).*Expected one width")


@pytest.mark.parametrize("model_class, config", [(GPT2LMHeadModel, "gpt2"), (BertForMaskedLM, "bert")])
def test_a_model_without_two_sides_is_refused(model_class, config):
    model = model_class(part_config(config, False))
    refused(model, *tokenizers_for("bert2gpt2"), "has no source embedding: expected an encoder-decoder")


def test_one_matrix_for_two_vocabularies_is_refused_and_untied_it_is_joined():
    model = translation_model("bart")
    source, target = tokenizers_for("bart", target_rows=VOCAB)
    refused(model, source, target, "are one parameter: every row would stand for two words.*untie")
    before = copy.deepcopy(untie(model))
    model, tokenizer = join_vocabularies(model, source, target)
    torch.testing.assert_close(logits(model, tokenizer)[..., :VOCAB], logits(before))


def test_tokenizers_of_equal_vocabularies_change_nothing_and_that_is_said():
    model = translation_model("bart")
    source, _ = tokenizers_for("bart")
    before = state_of(model)
    with CaptureLogger(logging.get_logger("hf_tying.vocabularies.join")) as said:
        model, tokenizer = join_vocabularies(model, source, copy.deepcopy(source))
    assert "same vocabulary already (64 words): nothing is changed" in said.out
    assert tokenizer is source
    after = state_of(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(before[0][name][1], after[0][name][1]) for name in before[0])


def test_equal_vocabularies_over_matrices_of_unequal_rows_get_equal_rows():
    model = model_for("bert2gpt2")
    source = wordpiece(ENGLISH, VOCAB, PAD_FIRST)
    before = copy.deepcopy(model)
    model, tokenizer = join_vocabularies(model, source, copy.deepcopy(source))
    assert tokenizer.joint.source_only == []
    assert model.config.encoder.vocab_size == model.config.decoder.vocab_size == TARGET
    torch.testing.assert_close(logits(model, tokenizer), logits(before))


def test_what_has_no_values_is_refused():
    model = model_for("bert2gpt2").to("meta")
    refused(model, *tokenizers_for("bert2gpt2"), "on the meta device.*Load the weights first")


def test_a_quantised_matrix_is_refused():
    model = model_for("bert2gpt2")
    held = model.decoder.lm_head.weight
    model.decoder.lm_head.weight = nn.Parameter(held.detach().to(torch.int8), requires_grad=False)
    refused(model, *tokenizers_for("bert2gpt2"), "is quantised.*Join before quantising")


def test_an_adapted_model_is_refused():
    from peft import LoraConfig, get_peft_model

    model = model_for("bert2gpt2")
    get_peft_model(model, LoraConfig(target_modules=["query"], r=2))
    refused(model, *tokenizers_for("bert2gpt2"), "carries adapters.*before get_peft_model")


def test_what_is_no_model_or_no_tokenizer_is_refused():
    source, target = tokenizers_for("fsmt")
    with pytest.raises(TyingError, match="expected a transformers PreTrainedModel"):
        join_vocabularies(nn.Linear(2, 2), source, target)
    refused(model_for("fsmt"), source, "gpt2", "Expected a transformers tokenizer, found str")


def test_a_matrix_tied_to_what_is_no_vocabulary_is_refused():
    model = joined_model(part_config("bert", False), part_config("gpt2", True, TARGET, n_positions=TARGET))
    tie(model, ["decoder.transformer.wte.weight", "decoder.transformer.wpe.weight"], init_from="mean")
    refused(model, *tokenizers_for("bert2gpt2"), r"wpe.weight' is tied to .* no vocabulary matrix. untie\(model")


def test_positions_counted_from_a_padding_id_that_moves_are_refused():
    special = ["<s>", "[PAD]", "</s>", "<unk>"]
    source = wordpiece(ENGLISH, VOCAB, special)
    model = joined_model(part_config("roberta", False, pad_token_id=1), part_config("gpt2", True, TARGET))
    refused(model, source, tokenizers_for("bert2gpt2")[1], "counts positions from the padding id.*it is 1.*become 0")
    target = byte_level(GERMAN, TARGET, BOS_FIRST, alphabet=False)
    before = copy.deepcopy(model)
    model, tokenizer = join_vocabularies(model, source, target)
    assert tokenizer.pad_token_id == 1
    torch.testing.assert_close(logits(model, tokenizer)[..., :TARGET], logits(before))


def test_padding_tokens_that_cannot_be_one_are_refused_where_a_config_has_one_id():
    source = wordpiece(ENGLISH, VOCAB, ["<s>", "[PAD]", "</s>", "<unk>"])
    target = byte_level(GERMAN, TARGET, ["<s>", "<x>", "</s>", "<unk>"], alphabet=False)
    target.pad_token = "</s>"
    match = "MarianConfig has one padding id for both sides, 1: .* which is not the target's padding token '</s>'"
    refused(model_for("marian_separate"), source, target, match)


def test_a_model_that_nothing_can_keep_from_the_sources_words_is_refused():
    model = model_for("fsmt")
    model.generation_config = None
    refused(model, *tokenizers_for("fsmt"), "no output bias and no generation_config")
    model.generation_config = GenerationConfig()
    model, tokenizer = join_vocabularies(model, *tokenizers_for("fsmt"))
    assert model.generation_config.suppress_tokens[0] == TARGET


def test_a_tokenizer_that_ends_both_sides_with_one_of_two_ids_is_refused(tmp_path):
    pytest.importorskip("sentencepiece", reason="MarianTokenizer needs it: pip install sentencepiece")
    tokenizer = marian_tokenizer(tmp_path)
    words = tokenizer.target_encoder
    words["</s>"], words["▁d"] = words["▁d"], words["</s>"]
    model = translation_model("marian_separate", TARGET)
    refused(model, tokenizer, None, "ends the text of both sides with id 0, but its target vocabulary has .* at ")
