"""The LSTM's state wherever one comes in, in `generate` too, and the model in a stock `Trainer` beside a stock one."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.generation import utils

from hf_tying import TyingError, use_tied_loss

from .test_lstm import WORDS, tiny_lstm
from .test_lstm import some_words as some_words_and_padding

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def some_words(**sizes) -> torch.Tensor:
    """Without the word 0, which `generate` takes for padding."""
    return some_words_and_padding(**sizes).clamp(min=1)


def sharp_lstm(**changes):
    """A model whose next word depends on what it has read."""
    return tiny_lstm(initializer_range=1.0, recurrent_initializer_range=1.0, **changes).eval()


def state_of(model, batch: int = 3, width: int | None = None):
    state = model.lstm.initial_state(batch)
    return state if width is None else tuple(tuple(part.new_zeros(batch, width) for part in layer) for layer in state)


# --- a state that does not fit ---------------------------------------------------------------------------------------

WRONG = {
    "a larger batch": lambda model: state_of(model, 5),
    "a smaller batch": lambda model: state_of(model, 1),
    "another width": lambda model: state_of(model, width=9),
    "fewer layers": lambda model: state_of(model)[:1],
    "no cell": lambda model: tuple(layer[:1] for layer in state_of(model)),
    "unbatched": lambda model: tuple(tuple(part[0] for part in layer) for layer in state_of(model)),
}
PATHS = {
    "the model": lambda model, ids, state: model(input_ids=ids, state=state),
    "the tied loss": lambda model, ids, state: use_tied_loss(model).train()(input_ids=ids, labels=ids, state=state),
    "the body": lambda model, ids, state: model.lstm(input_ids=ids, state=state),
    "vectors": lambda model, ids, state: model(inputs_embeds=model.lstm.embed_tokens(ids), state=state),
    "padding": lambda model, ids, state: model(
        input_ids=ids, attention_mask=torch.ones_like(ids).index_fill_(1, torch.tensor(0), 0), state=state
    ),
    "generate": lambda model, ids, state: model.generate(ids, state=state, **GREEDY),
    "beams": lambda model, ids, state: model.generate(ids, state=state, num_beams=2, **GREEDY),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_state_that_does_not_fit_is_refused_wherever_it_comes_in(wrong, path):
    model = tiny_lstm().eval()
    with pytest.raises(TyingError, match=r"expected .*\(3, 8\).*found .*state=None"):
        PATHS[path](model, some_words(), WRONG[wrong](model))


def test_a_layer_refuses_a_state_or_inputs_that_do_not_fit():
    layer, inputs = tiny_lstm().lstm.layers[0], torch.zeros(3, 4, 8)
    with pytest.raises(TyingError, match=r"expected .*\(3, 8\).*found .*\(2, 8\)"):
        layer(inputs, (torch.zeros(2, 8), torch.zeros(2, 8)))
    for vectors in (inputs[..., :7], inputs[0]):
        with pytest.raises(TyingError, match=r"expected \(batch, time, 8\)"):
            layer(vectors, (torch.zeros(3, 8), torch.zeros(3, 8)))
    with pytest.raises(TyingError, match=r"inputs_embeds.*\(3, 4, 9\): expected \(batch, time, 8\)"):
        tiny_lstm()(inputs_embeds=torch.zeros(3, 4, 9))


def test_the_ways_out_of_the_refusal_are_right():
    model, ids = sharp_lstm(), some_words(batch=5)
    state, rows = model(input_ids=ids[:, :6]).state, slice(2)
    cut = tuple(tuple(part[rows] for part in layer) for layer in state)
    found = model(input_ids=ids[:2, 6:], state=cut).logits
    torch.testing.assert_close(found, model(input_ids=ids[:2]).logits[:, 6:])
    torch.testing.assert_close(model(input_ids=ids[:2], state=None).logits, model(input_ids=ids[:2]).logits)


# --- generate --------------------------------------------------------------------------------------------------------

HOW = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several sequences": {"num_beams": 4, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "beams, no cache": {"num_beams": 3, "use_cache": False},
}


@pytest.mark.parametrize("read", [1, 5, 8])
@pytest.mark.parametrize("how", HOW)
def test_a_prompt_after_a_state_goes_on_as_the_whole_text_does(how, read):
    model, ids = sharp_lstm(), some_words(length=9)
    whole = model.generate(ids, **GREEDY | HOW[how])
    rest = model.generate(ids[:, read:], state=model(input_ids=ids[:, :read]).state, **GREEDY | HOW[how])
    assert torch.equal(rest, whole[:, read:])


def test_sampled_sequences_after_a_state_are_those_of_the_whole_text():
    model, ids = sharp_lstm(), some_words(length=9)
    how = GREEDY | {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(5)
    whole = model.generate(ids, **how)
    torch.manual_seed(5)
    rest = model.generate(ids[:, 4:], state=model(input_ids=ids[:, :4]).state, **how)
    assert len(whole) == 9 and torch.equal(rest, whole[:, 4:])


def test_vectors_after_a_state_are_read_whole():
    model, ids = sharp_lstm(), some_words(length=9)
    state, vectors = model(input_ids=ids[:, :4]).state, model.lstm.embed_tokens(ids[:, 4:])
    words = model.generate(inputs_embeds=vectors, state=state, **GREEDY)
    assert torch.equal(words, model.generate(ids, **GREEDY)[:, 9:])


@pytest.mark.parametrize("names", [["cache"], ["past_key_values", "cache"]])
@pytest.mark.parametrize("how", HOW)
def test_a_transformers_that_carries_only_a_cache_reads_each_word_once(how, names, monkeypatch):
    model, ids = sharp_lstm(), some_words(length=9)
    expected = model.generate(ids, **GREEDY | HOW[how])
    monkeypatch.setattr(utils, "ALL_CACHE_NAMES", names)
    read = []
    model.lstm.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for first in (0, 4):
        state = model.lstm(input_ids=ids[:, :first]).state if first else None
        read.clear()
        assert torch.equal(model.generate(ids[:, first:], state=state, **GREEDY | HOW[how]), expected[:, first:])
        assert read[1:] == ([10 - first + i for i in range(4)] if "no cache" in how else [1] * 4)


# --- a stock Trainer -------------------------------------------------------------------------------------------------


def tiny_llama():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes))


@pytest.mark.parametrize("make", [tiny_llama, tiny_lstm])
def test_a_stock_trainer_evaluates_the_loss(make, tmp_path):
    model, ids = make(), some_words(batch=5)
    args = TrainingArguments(tmp_path, use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=5)
    trainer = Trainer(model, args, eval_dataset=[{"input_ids": row, "labels": row} for row in ids])
    assert trainer.label_names == ["labels"]
    expected = model.eval()(input_ids=ids, labels=ids).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
