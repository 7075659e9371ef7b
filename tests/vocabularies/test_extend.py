"""New words in a trained language model: the mean row, tied, and nothing that was there changes."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_tying import TyingError, assert_tied, tie
from hf_tying.data import extend_vocabulary, train_byte_level_bpe, train_word_tokenizer
from hf_tying.models import TiedLSTMConfig, TiedLSTMForCausalLM, TiedLSTMForSequenceClassification

OLD, NEW = ["the cat sat on the mat .", "a <unk> sat ."], ["the dog sat on a rug !", "the Dog"]


def lstm(rows: int, **changes):
    return TiedLSTMForCausalLM(TiedLSTMConfig(vocab_size=rows, embedding_size=6, hidden_size=6, **changes))


def gpt2(rows: int):
    config = AutoConfig.for_model("gpt2", vocab_size=rows, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    return tie(AutoModelForCausalLM.from_config(config), "two_way")


MODELS = {
    "tied": lstm,
    "untied": lambda rows: lstm(rows, tie_word_embeddings=False),
    "without bias": lambda rows: lstm(rows, output_bias=False),
    "gpt2": gpt2,
    "classifier": lambda rows: TiedLSTMForSequenceClassification(lstm(rows).config),
    "half": lambda rows: lstm(rows).to(torch.bfloat16),
    "more rows than words": lambda rows: lstm(rows + 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_new_words_have_the_mean_row_and_old_rows_are_the_same_to_the_bit(name, tmp_path):
    torch.manual_seed(0)
    tokenizer, other = train_word_tokenizer(OLD), train_word_tokenizer(NEW)
    model = MODELS[name](len(tokenizer)).eval()
    before, ids = copy.deepcopy(model), tokenizer(OLD[0], return_tensors="pt").input_ids
    rows = before.config.vocab_size
    extended = extend_vocabulary(model, tokenizer, other)

    new = {"dog", "rug", "!", "Dog"}
    assert set(extended.get_vocab()) - set(tokenizer.get_vocab()) == new and len(tokenizer) == len(
        set(tokenizer.get_vocab())
    )
    assert model.config.vocab_size == rows + len(new)
    assert sorted(extended.get_vocab()[word] for word in new) == list(range(rows, rows + len(new)))
    assert_tied(model)
    old, now = dict(before.named_parameters()), dict(model.named_parameters())
    grown = 0
    for parameter_name, values in now.items():
        was = old[parameter_name]
        if len(values) > len(was):
            grown += 1
            mean = was.double().mean(dim=0).to(values.dtype)
            assert all(torch.equal(row, mean) for row in values[rows:])
        assert torch.equal(values[: len(was)], was)
    assert grown == {"untied": 3, "tied": 2, "half": 2, "more rows than words": 2}.get(name, 1)
    logits, expected = model(ids).logits, before(ids).logits
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected)

    assert extended("the dog <unk> ").tokens() == ["the", "dog", "<unk>", "<eos>"]
    assert extended(OLD)["input_ids"] == tokenizer(OLD)["input_ids"]
    extended.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(NEW)["input_ids"] == extended(NEW)["input_ids"]
    assert "dog" not in tokenizer.get_vocab()


def test_without_new_words_nothing_changes():
    tokenizer = train_word_tokenizer(OLD)
    model = lstm(len(tokenizer))
    assert extend_vocabulary(model, tokenizer, train_word_tokenizer(OLD[:1])) is tokenizer
    assert model.config.vocab_size == len(tokenizer)


def test_what_has_no_whole_words_or_too_few_rows_is_refused():
    tokenizer, pieces = train_word_tokenizer(OLD), train_byte_level_bpe(OLD, 260)
    model = lstm(len(tokenizer))
    with pytest.raises(TyingError, match="BPE vocabulary: expected whole words"):
        extend_vocabulary(model, tokenizer, pieces)
    with pytest.raises(TyingError, match="a row for each word"):
        extend_vocabulary(lstm(3), tokenizer, train_word_tokenizer(NEW))
    assert model.config.vocab_size == len(tokenizer)
