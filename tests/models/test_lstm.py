"""The LSTM language model: sizes, numbers against plain torch, each dropout against its definition, state, cache."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_tying import TyingError, assert_tied, tie, tying_report, untie, use_tied_loss
from hf_tying.models import TiedLSTMConfig, TiedLSTMForCausalLM, TiedLSTMModel
from hf_tying.models.lstm.dropout import drop, drop_words, locked_mask
from hf_tying.models.lstm.layer import LSTMLayer
from hf_tying.models.lstm.sizes import SIZES

WORDS = 50


def tiny_lstm(**changes) -> TiedLSTMForCausalLM:
    torch.manual_seed(0)
    return TiedLSTMForCausalLM(
        TiedLSTMConfig(**{"vocab_size": WORDS, "embedding_size": 8, "hidden_size": 8} | changes)
    )


def some_words(batch: int = 3, length: int = 13) -> torch.Tensor:
    return torch.randint(0, WORDS, (batch, length), generator=torch.Generator().manual_seed(1))


def plain_lstm(model: TiedLSTMForCausalLM) -> nn.LSTM:
    """`torch.nn.LSTM` with the model's weights, its second bias at zero."""
    widths = {layer.hidden_size for layer in model.lstm.layers}
    assert len(widths) == 1
    plain = nn.LSTM(model.config.embedding_size, widths.pop(), len(model.lstm.layers), batch_first=True)
    with torch.no_grad():
        for i, layer in enumerate(model.lstm.layers):
            for name in ("weight_ih", "weight_hh", "bias_ih"):
                getattr(plain, f"{name}_l{i}").copy_(getattr(layer, f"{name}_l0"))
            getattr(plain, f"bias_hh_l{i}").zero_()
    return plain


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tied", "projection", "parameters"),
    [(False, None, 4_651_600), (True, None, 2_651_600), (False, True, 4_691_800), (True, True, 2_691_800)],
)
def test_the_parameters_of_press_and_wolfs_table_to_the_unit(tied, projection, parameters):
    scheme = "two_way" if tied else "none"
    config = TiedLSTMConfig.named(
        "zaremba_small", tying={"version": 1, "scheme": scheme, "projection": projection and {}}
    )
    with torch.device("meta"):
        model = TiedLSTMForCausalLM(config)
    assert model.num_parameters() == parameters
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("size", SIZES)
def test_every_named_size_is_a_model_that_learns(size):
    config = TiedLSTMConfig.named(size, vocab_size=WORDS, embedding_size=6, hidden_size=7 if size == "awd" else 6)
    model = TiedLSTMForCausalLM(config).train()
    ids = some_words()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in model.parameters())
    assert_tied(model)


def test_the_widths_of_the_papers():
    def layers(size, tied):
        return TiedLSTMConfig.named(size, tie_word_embeddings=tied).layer_widths

    assert layers("zaremba_large", False) == [1500, 1500]
    assert layers("inan_medium", True) == [650, 650]
    assert layers("awd", True) == [1150, 1150, 400]  # the last one is as wide as the embedding where it is tied
    assert layers("awd", False) == [1150, 1150, 1150]
    for scheme, widths in (("none", [9, 9]), ("two_way", [9, 8])):  # `tying` says it too, before the flag
        config = TiedLSTMConfig(embedding_size=8, hidden_size=9, tying={"version": 1, "scheme": scheme})
        assert config.layer_widths == widths


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_sizes": [8, 9]}, "equal widths"),
        ({"hidden_size": 9, "layer_sizes": [9]}, "equal widths"),
        ({"dropout_kind": "locked"}, "'standard' or 'variational'"),
        ({"output_dropout": 1.0}, r"rate in \[0, 1\)"),
        ({"weight_dropout": -0.1}, r"rate in \[0, 1\)"),
        ({"shared_recurrent_mask": True}, "dropout_kind='variational'"),
        ({"vocab_size": 0}, "positive widths"),
        ({"num_hidden_layers": 0}, "at least one"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(TyingError, match=message):
        TiedLSTMConfig(**{"embedding_size": 8, "hidden_size": 8} | changes)
    with pytest.raises(TyingError, match="zaremba_small"):
        TiedLSTMConfig.named("zaremba_tiny")


def test_unequal_widths_are_fine_untied_and_refused_by_tie():
    model = tiny_lstm(hidden_size=9, tie_word_embeddings=False)
    assert model(input_ids=some_words()).logits.shape == (3, 13, WORDS)
    with pytest.raises(TyingError, match="shape"):
        tie(model, "two_way", init_from="output")


def test_initial_values_are_those_of_the_config():
    model = tiny_lstm(initializer_range=0.3, recurrent_initializer_range=0.04, tie_word_embeddings=False)
    for matrix in (model.lstm.embed_tokens.weight, model.lm_head.weight, model.lm_head.bias):
        assert 0.25 < matrix.abs().max() <= 0.3
    for layer in model.lstm.layers:
        assert 0.035 < layer.weight_ih_l0.abs().max() <= 0.04 and 0.035 < layer.weight_hh_l0.abs().max() <= 0.04
        assert not layer.bias_ih_l0.any() and not layer.bias_hh_l0.any()
    entry = {"version": 1, "scheme": "none", "projection": True}
    model = tiny_lstm(recurrent_initializer_range=None, zero_output_bias=True, hidden_size=25, tying=entry)
    for matrix in (model.lstm.layers[0].weight_ih_l0, model.lstm.layers[0].weight_hh_l0):
        assert 0.15 < matrix.abs().max() <= 25**-0.5  # of the layer's width, not of what comes in
    assert not model.lm_head.bias.any() and model.lm_head.projection.bias.any()
    assert tiny_lstm(output_bias=False).lm_head.bias is None


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_plain_torch(tied):
    model, ids = tiny_lstm(tie_word_embeddings=tied).double().train(), some_words()
    plain = plain_lstm(model).double()
    embedding = model.lstm.embed_tokens.weight.detach().clone().requires_grad_()
    output = embedding if tied else model.lm_head.weight.detach().clone().requires_grad_()
    bias = model.lm_head.bias.detach().clone().requires_grad_()
    hidden, _ = plain(F.embedding(ids[:, :-1], embedding))
    expected = F.cross_entropy(F.linear(hidden, output, bias).reshape(-1, WORDS), ids[:, 1:].reshape(-1))
    expected.backward()

    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(model.lstm.embed_tokens.weight.grad, embedding.grad, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(model.lm_head.weight.grad, output.grad, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(model.lm_head.bias.grad, bias.grad, rtol=1e-5, atol=1e-8)
    for i, layer in enumerate(model.lstm.layers):
        torch.testing.assert_close(
            layer.weight_hh_l0.grad, getattr(plain, f"weight_hh_l{i}").grad, rtol=1e-5, atol=1e-8
        )
        torch.testing.assert_close(layer.bias_ih_l0.grad, getattr(plain, f"bias_ih_l{i}").grad, rtol=1e-5, atol=1e-8)


def test_the_second_bias_is_no_parameter_and_stays_zero():
    model, ids = tiny_lstm().train(), some_words()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not any("bias_hh" in name for name, _ in model.named_parameters())
    assert not any("bias_hh" in name for name in model.state_dict())
    assert all(not layer.bias_hh_l0.any() for layer in model.lstm.layers)


def test_step_by_step_is_the_same_as_torch_lstm_in_one():
    layer, inputs = LSTMLayer(5, 7).double(), torch.randn(3, 11, 5, dtype=torch.float64, requires_grad=True)
    state = (torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64))
    results = []
    for mask in (None, torch.ones(3, 7, dtype=torch.float64)):
        outputs, after = layer(inputs, state, mask)
        (gradient,) = torch.autograd.grad(outputs.square().sum() + after[1].sum(), inputs)
        results.append((outputs, *after, gradient))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_shift_labels_are_the_next_words_and_none_is_lost():
    model, ids = tiny_lstm().eval(), some_words()
    whole = model(input_ids=ids, labels=ids).loss
    pieces = model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss
    torch.testing.assert_close(whole, pieces)
    summed = model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:], num_items_in_batch=3).loss
    torch.testing.assert_close(summed, pieces * 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tied_softmax_gives_the_same_step(dtype):
    model, ids = tiny_lstm().to(dtype).train(), some_words()
    twin = use_tied_loss(copy.deepcopy(model))
    losses = [m(input_ids=ids[:, :-1], shift_labels=ids[:, 1:], num_items_in_batch=3) for m in (model, twin)]
    assert losses[1].logits is None and losses[0].logits is not None
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(losses[0].loss, losses[1].loss, rtol=tolerance, atol=tolerance)
    for output in losses:
        output.loss.backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=10 * tolerance, atol=tolerance)


# --- the state -------------------------------------------------------------------------------------------------------


def test_a_text_in_pieces_is_the_text_in_one_pass():
    model, ids = tiny_lstm(num_hidden_layers=3).eval(), some_words(length=20)
    whole = model(input_ids=ids)
    state, pieces = None, []
    for piece in ids.split([7, 1, 12], dim=1):
        output = model(input_ids=piece, state=state)
        state = output.state
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole.logits)
    for one, other in zip(state, whole.state, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_go_back_through_the_state_until_somebody_detaches_it():
    model, ids = tiny_lstm().double(), some_words(length=20)
    first = model(input_ids=ids[:, :10])
    model(input_ids=ids[:, 10:], state=first.state).logits.sum().backward()
    through = model.lstm.layers[0].weight_hh_l0.grad.clone()
    model.zero_grad()
    cut = tuple(tuple(part.detach() for part in layer) for layer in first.state)
    model(input_ids=ids[:, 10:], state=cut).logits.sum().backward()
    assert not torch.allclose(through, model.lstm.layers[0].weight_hh_l0.grad)


def test_the_state_is_not_given_out_unless_wanted():
    model, ids = tiny_lstm(use_cache=False), some_words()
    assert model(input_ids=ids).state is None
    assert len(model(input_ids=ids, use_cache=True).state) == 2
    loss, logits, state = model(input_ids=ids, labels=ids, use_cache=True, return_dict=False)
    assert loss.ndim == 0 and logits.shape == (3, 13, WORDS) and len(state) == 2


def test_padding_leaves_the_state_as_it_was():
    model, ids = tiny_lstm().eval(), some_words(batch=2, length=9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    padded = model(input_ids=ids, attention_mask=mask)
    alone = model(input_ids=ids[1:, 4:])
    torch.testing.assert_close(padded.logits[1:, 4:], alone.logits)
    torch.testing.assert_close(padded.logits[:1], model(input_ids=ids[:1]).logits)
    right = model(input_ids=ids, attention_mask=mask.flip(1))
    for layer, short in zip(right.state, model(input_ids=ids[1:, :5]).state, strict=True):
        torch.testing.assert_close(layer[0][1:], short[0])
        torch.testing.assert_close(layer[1][1:], short[1])


def test_a_mask_of_the_whole_text_is_that_of_its_last_words():
    model, ids = tiny_lstm(recurrent_initializer_range=1.0).eval(), some_words(batch=2, length=9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    first = model(input_ids=ids[:, :6], attention_mask=mask[:, :6])
    second = model(input_ids=ids[:, 6:], attention_mask=mask, state=first.state)
    torch.testing.assert_close(second.logits[1:], model(input_ids=ids[1:, 4:]).logits[:, 2:])
    last = model(input_ids=ids[:, 6:], attention_mask=mask.flip(1), state=first.state)  # all but two are padding
    alone = model(input_ids=ids[1:, 4:6]).state
    for layer, before in zip(last.state, alone, strict=True):
        torch.testing.assert_close(layer[0][1:], before[0])


def test_padding_leaves_the_state_without_the_mask_of_recurrent_dropout():
    layer, inputs = LSTMLayer(5, 7).double(), torch.randn(2, 4, 5, dtype=torch.float64)
    state = tuple(torch.randn(2, 7, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[0.0, 2.0] * 3 + [2.0]] * 2, dtype=torch.float64)
    attended = torch.tensor([[False] * 2 + [True] * 2, [False] * 4])
    outputs, after = layer(inputs, state, mask, attended=attended)
    alone, _ = layer(inputs[:1, 2:], tuple(part[:1] for part in state), mask[:1])
    torch.testing.assert_close(outputs[:1, 2:], alone)
    assert torch.equal(after[0][1], state[0][1]) and torch.equal(after[1][1], state[1][1])


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generate_carries_the_state(how):
    model = tiny_lstm().eval()
    prompt = some_words(batch=2, length=5)
    read = []
    handle = model.lstm.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    words = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, **how)
    handle.remove()
    assert words.shape == (2, 11)
    assert read == ([5, 6, 7, 8, 9, 10] if how.get("use_cache") is False else [5, 1, 1, 1, 1, 1])
    if "num_beams" not in how:
        logits = model(input_ids=words).logits
        assert torch.equal(logits[:, 4:-1].argmax(-1), words[:, 5:])


def test_beam_search_with_the_state_finds_what_it_finds_without():
    model = tiny_lstm(initializer_range=1.0, recurrent_initializer_range=1.0).eval()
    prompt = some_words(batch=3, length=4)
    how = {"max_new_tokens": 8, "num_beams": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **how), model.generate(prompt, use_cache=False, **how))


def test_a_left_padded_batch_generates_what_each_row_does_alone():
    model = tiny_lstm(initializer_range=1.0, recurrent_initializer_range=1.0).eval()
    prompt = some_words(batch=2, length=6)
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0
    together = model.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    alone = model.generate(prompt[1:, 3:], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(together[1, 6:], alone[0, 3:])


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_a_locked_mask_is_one_for_each_example_through_all_steps():
    vectors = torch.ones(4, 9, 200)
    dropped = drop(vectors, 0.25, locked=True)
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert 0.2 < (dropped == 0).float().mean() < 0.3
    assert not torch.equal(dropped[0], dropped[1])


def test_standard_dropout_is_new_at_each_step():
    dropped = drop(torch.ones(4, 9, 200), 0.25)
    assert not torch.equal(dropped[:, 0], dropped[:, 1]) and 0.2 < (dropped == 0).float().mean() < 0.3


def test_dropped_words_are_those_of_a_masked_copy_of_the_embedding():
    weight = torch.randn(WORDS, 4, dtype=torch.float64, requires_grad=True)
    ids = some_words(4, 30)
    torch.manual_seed(3)
    dropped = drop_words(F.embedding(ids, weight), ids, WORDS, 0.4)
    torch.manual_seed(3)
    mask = torch.empty(WORDS, dtype=torch.float64).bernoulli_(0.6) / 0.6
    expected = F.embedding(ids, weight * mask[:, None])
    torch.testing.assert_close(dropped, expected)
    one, other = (torch.autograd.grad(x.square().sum(), weight)[0] for x in (dropped, expected))
    torch.testing.assert_close(one, other)
    assert 0 < (mask == 0).sum() < WORDS


def test_embedding_dropout_is_of_the_input_role_only():
    """All words but one dropped: the softmax still has all its rows."""
    model, ids = tiny_lstm(embedding_dropout=0.9).train(), some_words()
    hidden = torch.randn(2, 8)
    with torch.no_grad():
        before = model.lm_head(hidden)
        model(input_ids=ids)
        assert torch.equal(model.lm_head(hidden), before)
        looked_up = model.lstm(input_ids=ids, output_hidden_states=True).hidden_states[0]
    dropped = (looked_up == 0).all(-1)
    assert dropped.float().mean() > 0.5
    for word in ids[dropped].unique():
        assert dropped[ids == word].all()  # every occurrence of a dropped word


@pytest.mark.parametrize("name", ["input_dropout", "hidden_dropout", "output_dropout", "recurrent_dropout"])
@pytest.mark.parametrize("kind", ["standard", "variational"])
def test_dropout_is_off_in_evaluation_and_on_in_training(name, kind):
    model, ids = tiny_lstm(**{name: 0.5, "dropout_kind": kind}), some_words()
    plain = tiny_lstm().eval()
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits)
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["standard", "variational"])
def test_each_rate_is_at_its_place_and_of_its_kind(kind):
    rates = {"input_dropout": 0.2, "hidden_dropout": 0.5, "output_dropout": 0.8}
    model = tiny_lstm(embedding_size=60, hidden_size=60, dropout_kind=kind, **rates).train()
    given = []
    for layer in model.lstm.layers:
        layer.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    output = model.lstm(input_ids=some_words(), output_hidden_states=True)
    after = [*given, output.last_hidden_state]
    for rate, whole, dropped in zip(rates.values(), output.hidden_states, after, strict=True):
        mask = dropped / whole
        assert (mask == 0).float().mean() == pytest.approx(rate, abs=0.1)
        torch.testing.assert_close(mask[mask != 0], torch.full_like(mask[mask != 0], 1 / (1 - rate)))
        assert torch.equal(mask[:, 0] == 0, mask[:, 1] == 0) is (kind == "variational")


def test_variational_dropout_of_the_recurrent_input_by_its_definition():
    """h_t = cell(x_t, mask * h_{t-1}), one mask for each example through all steps (Gal & Ghahramani 2016)."""
    layer, inputs = LSTMLayer(5, 7).double(), torch.randn(3, 6, 5, dtype=torch.float64)
    h = c = torch.zeros(3, 7, dtype=torch.float64)
    mask = locked_mask(h, 0.5)
    outputs, after = layer(inputs, (h, c), mask)
    cell = nn.LSTMCell(5, 7).double()
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih"):
            getattr(cell, name).copy_(getattr(layer, f"{name}_l0"))
        cell.bias_hh.zero_()
        for step in range(6):
            h, c = cell(inputs[:, step], (h * mask, c))
            torch.testing.assert_close(outputs[:, step], h)
    torch.testing.assert_close(after[0], h)  # the state is without the mask


def test_inans_mask_is_one_for_the_way_up_and_the_way_on(monkeypatch):
    from hf_tying.models.lstm import modeling_lstm

    masks = []

    def seen(like, rate):
        masks.append(locked_mask(like, rate))
        return masks[-1]

    monkeypatch.setattr(modeling_lstm, "locked_mask", seen)
    model = tiny_lstm(
        dropout_kind="variational", shared_recurrent_mask=True, hidden_dropout=0.5, output_dropout=0.5
    ).train()
    given = []
    for layer in model.lstm.layers:
        layer.register_forward_pre_hook(lambda module, args: given.append(args))
    output = model.lstm(input_ids=some_words(), output_hidden_states=True)
    assert len(masks) == 2
    assert given[0][2] is masks[0] and given[1][2] is masks[1]  # into the next step
    torch.testing.assert_close(given[1][0], output.hidden_states[1] * masks[0][:, None])  # into the next layer
    torch.testing.assert_close(output.last_hidden_state, output.hidden_states[2] * masks[1][:, None])


def test_weight_drop_is_of_the_recurrent_weights_once_for_a_pass(monkeypatch):
    layer, inputs = LSTMLayer(5, 7).double(), torch.randn(3, 6, 5, dtype=torch.float64)
    zeros = (torch.zeros(3, 7, dtype=torch.float64),) * 2
    torch.manual_seed(5)
    outputs, _ = layer(inputs, zeros, weight_dropout=0.5)
    torch.manual_seed(5)
    dropped = F.dropout(layer.weight_hh_l0, 0.5)
    plain = nn.LSTM(5, 7, batch_first=True).double()
    with torch.no_grad():
        plain.weight_ih_l0.copy_(layer.weight_ih_l0)
        plain.weight_hh_l0.copy_(dropped)
        plain.bias_ih_l0.copy_(layer.bias_ih_l0)
        plain.bias_hh_l0.zero_()
    torch.testing.assert_close(outputs, plain(inputs)[0])
    model = tiny_lstm(weight_dropout=0.5)
    assert not torch.equal(model.train()(input_ids=some_words()).logits, model.eval()(input_ids=some_words()).logits)


def test_ar_and_tar_by_their_definitions():
    changes = {"activation_regularization": 2.0, "temporal_activation_regularization": 3.0, "output_dropout": 0.5}
    changes |= {"initializer_range": 1.0, "recurrent_initializer_range": 1.0}  # so that the terms can be told apart
    model, ids = tiny_lstm(**changes).train(), some_words()
    torch.manual_seed(9)
    total = model(input_ids=ids, labels=ids).loss
    parts = model.loss_parts
    torch.manual_seed(9)
    outputs = model.lstm(input_ids=ids, output_hidden_states=True)
    dropped, raw = outputs.last_hidden_state, outputs.hidden_states[-1]
    logits = model.lm_head(dropped)[:, :-1].reshape(-1, WORDS)
    penalty = 2 * dropped.pow(2).mean() + 3 * (raw[:, 1:] - raw[:, :-1]).pow(2).mean()
    expected = F.cross_entropy(logits, ids[:, 1:].reshape(-1))
    torch.testing.assert_close(total, expected + penalty)
    torch.testing.assert_close(parts["cross_entropy"], expected.detach())
    torch.testing.assert_close(parts["activation"], penalty.detach())
    model.eval()
    evaluated = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(
        evaluated.loss, F.cross_entropy(evaluated.logits[:, :-1].reshape(-1, WORDS), ids[:, 1:].reshape(-1))
    )
    assert not hasattr(model, "loss_parts")


def test_ar_and_tar_add_up_with_the_tied_softmax():
    model, ids = tiny_lstm(activation_regularization=2.0, temporal_activation_regularization=1.0).train(), some_words()
    twin = use_tied_loss(copy.deepcopy(model))
    one, other = (m(input_ids=ids, labels=ids).loss for m in (model, twin))
    torch.testing.assert_close(one, other)
    one.backward(), other.backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


# --- a model of transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_saved_and_loaded_by_the_auto_classes(tmp_path, tied, dtype):
    model, ids = tiny_lstm(tie_word_embeddings=tied).to(dtype).eval(), some_words()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert type(again) is TiedLSTMForCausalLM
    assert (again.lm_head.weight is again.lstm.embed_tokens.weight) is tied
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TiedLSTMConfig)
    body = AutoModel.from_pretrained(tmp_path, dtype=dtype).eval()
    assert type(body) is TiedLSTMModel
    torch.testing.assert_close(body(input_ids=ids).last_hidden_state, model.lstm(input_ids=ids).last_hidden_state)


def test_tie_untie_and_resize():
    model, ids = tiny_lstm(tie_word_embeddings=False).eval(), some_words()
    tie(model, "two_way", init_from="output")
    assert tying_report(model).groups[0].names == ["lstm.embed_tokens.weight", "lm_head.weight"]
    before = model(input_ids=ids).logits
    model.resize_token_embeddings(WORDS + 6)
    assert_tied(model)
    torch.testing.assert_close(model(input_ids=ids).logits[..., :WORDS], before)
    assert model(input_ids=ids).logits.shape[-1] == WORDS + 6 == model.config.vocab_size
    untie(model)
    assert model.lm_head.weight is not model.lstm.embed_tokens.weight


def test_it_wants_ids_or_vectors_and_not_both():
    model, ids = tiny_lstm().eval(), some_words()
    vectors = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=vectors).logits, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(input_ids=ids, inputs_embeds=vectors)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_only_the_last_logits_are_computed_where_only_they_are_wanted():
    model, ids = tiny_lstm().eval(), some_words()
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=2).logits, model(input_ids=ids).logits[:, -2:])
