"""f12, f25: embeddings that are resized or replaced stay tied, and an untied matrix is not lost."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BarkFineConfig, BarkFineModel

from hf_tying import TyingError, assert_tied, tie, untie
from hf_tying.ties.anatomy import roles
from hf_tying.ties.slots import find_slot

from ..forms import matrix, reload, tied_model
from ..tiny import logits, shared_names, tiny_model


def rows(model):
    """Every size that a model states for its vocabulary."""
    sizes = {model.config.get_text_config().vocab_size}
    for role in roles(model).values():
        for name in role.names:
            module = find_slot(model, name)[0]
            sizes.add(module.weight.shape[0])
            sizes.add(getattr(module, "num_embeddings", getattr(module, "out_features", None)))
            if getattr(module, "bias", None) is not None:
                sizes.add(module.bias.shape[0])
    return sizes


class TestResizeOfATiedModel:
    """f12: resize, save, load; sizes stated elsewhere follow."""

    @pytest.mark.parametrize("arch", ["gpt2", "bert", "t5", "bart", "llava"])
    @pytest.mark.parametrize("count, kwargs, expected", [
        (80, {}, 80), (50, {}, 50), (65, {"pad_to_multiple_of": 8}, 72), (None, {"pad_to_multiple_of": 48}, 96),
    ])  # fmt: skip
    def test_a_tied_matrix_resized_up_down_or_padded_stays_one_parameter(
        self, form, arch, count, kwargs, expected, tmp_path
    ):
        model = tied_model(form, arch, "three_way" if arch in ("t5", "bart") else "two_way")
        before = matrix(model, "output").detach().clone()
        model.resize_token_embeddings(count, **kwargs)
        assert_tied(model)
        assert rows(model) == {expected}
        kept = min(64, expected)
        assert torch.equal(matrix(model, "target")[:kept], before[:kept])
        model.save_pretrained(tmp_path)
        loaded = reload(model, tmp_path)
        assert_tied(loaded)
        assert rows(loaded) == {expected}

    def test_the_optimizer_keeps_the_live_parameter_of_a_resized_model(self, model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.resize_token_embeddings(80)
        assert any(p is model.lm_head.weight for p in optimizer.param_groups[0]["params"])


class TestResizeOfPartlyTiedTranslationModels:
    """f25: BART with the flag off, or tied in part; the stock resize throws trained matrices away."""

    @pytest.mark.parametrize("scheme", ["none", "two_way", "source_target"])
    @pytest.mark.parametrize("count", [80, 50])
    def test_every_trained_row_of_a_partly_tied_bart_survives_the_resize_and_the_file(
        self, form, scheme, count, tmp_path
    ):
        model = tied_model(form, "bart", scheme)
        before = {role: matrix(model, role).detach().clone() for role in roles(model)}
        model.resize_token_embeddings(count)
        assert_tied(model)
        kept = min(64, count)
        for role, rows_before in before.items():
            assert torch.equal(matrix(model, role)[:kept], rows_before[:kept]), role
        assert rows(model) == {count}
        model.save_pretrained(tmp_path)
        loaded = reload(model, tmp_path)
        assert torch.equal(logits(loaded) if count == 80 else matrix(loaded, "source"),
                           logits(model) if count == 80 else matrix(model, "source"))  # fmt: skip
        assert loaded.config.tying["scheme"] == scheme

    def test_encoder_and_decoder_of_a_resized_bart_remain_two_modules(self, form):
        model = tied_model(form, "bart", "none")
        model.resize_token_embeddings(80)
        assert model.model.encoder.embed_tokens is not model.model.decoder.embed_tokens

    def test_stock_bart_with_the_flag_off_is_whole_after_tie_none(self, tmp_path):
        model = tie(tiny_model("bart", tie_word_embeddings=False), "none")
        before = logits(model)
        model.resize_token_embeddings(80)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert torch.allclose(logits(loaded)[..., :64], before, atol=1e-6)
        assert model.get_input_embeddings().weight is model.model.encoder.embed_tokens.weight  # the one that is used


class TestReplacedEmbeddings:
    """f12: set_input_embeddings and set_output_embeddings."""

    def test_a_replaced_input_embedding_is_the_matrix_under_every_name(self, model, tmp_path):
        new = nn.Embedding(70, 16)
        model.set_input_embeddings(new)
        assert model.get_input_embeddings() is new
        assert_tied(model)
        assert model.lm_head.weight is new.weight and rows(model) == {70}
        model.save_pretrained(tmp_path)
        assert load_file(tmp_path / "model.safetensors")["transformer.wte.weight"].shape == (70, 16)

    def test_a_replaced_output_embedding_of_other_values_would_be_the_input_embedding_too_and_is_refused(self, model):
        old, before = model.lm_head, logits(model)
        new = nn.Linear(16, 64, bias=False)
        with pytest.raises(TyingError, match=r"other values.*untie\(model\) first.*set_input_embeddings"):
            model.set_output_embeddings(new)
        assert model.lm_head is old and torch.equal(logits(model), before)
        untie(model)
        model.set_output_embeddings(new)
        assert model.lm_head is new and model.transformer.wte.weight is not new.weight

    def test_a_replaced_output_embedding_of_the_same_values_is_the_one_matrix(self, model):
        new = nn.Linear(16, 64, bias=False)
        new.weight.data = model.lm_head.weight.detach().clone()
        model.set_output_embeddings(new)
        assert_tied(model)
        assert model.lm_head is new and model.transformer.wte.weight is new.weight

    def test_an_embedding_without_a_matrix_is_refused_and_nothing_is_changed(self, model):
        old = model.get_input_embeddings()
        with pytest.raises(TyingError, match="expected a module with a matrix `weight`, found Identity"):
            model.set_input_embeddings(nn.Identity())
        assert model.get_input_embeddings() is old
        assert_tied(model)

    def test_encoder_and_decoder_of_bart_follow_a_replaced_embedding_but_stay_two_modules(self, form):
        model = tied_model(form, "bart", "three_way")
        new = nn.Embedding(64, 16)
        model.set_input_embeddings(new)
        assert_tied(model)
        assert matrix(model, "source") is matrix(model, "output") is new.weight
        assert model.model.encoder.embed_tokens is not model.model.decoder.embed_tokens

    def test_an_untied_model_replaces_one_side_alone(self, model):
        untie(model)
        head = model.lm_head.weight
        model.set_input_embeddings(nn.Embedding(64, 16))
        assert model.lm_head.weight is head
        assert_tied(model)

    def test_an_embedding_put_in_by_hand_is_told_at_the_next_training_step(self, model):
        model.transformer.wte = nn.Embedding(64, 16)
        model.train()
        with pytest.raises(TyingError, match="Cannot train"):
            model(input_ids=torch.arange(4)[None])
        with pytest.raises(TyingError, match="would overwrite trained values"):
            model.tie_weights()
        tie(model, "two_way", init_from="target")
        model(input_ids=torch.arange(4)[None])


def test_a_list_of_embeddings_is_resized_as_an_untouched_one(tmp_path):
    sizes = {"input_vocab_size": 20, "output_vocab_size": 20, "num_layers": 1, "num_heads": 2, "hidden_size": 16}
    stock = BarkFineModel(BarkFineConfig(**sizes, n_codes_total=3, n_codes_given=1, block_size=8))
    before = shared_names(stock)
    model = tie(copy.deepcopy(stock), dict(zip(["first", "second"], before, strict=True)))
    for rows in (24, 16):
        for resized in (stock, model):
            torch.manual_seed(0)
            resized.resize_token_embeddings(rows)
        assert_tied(model)
        assert shared_names(model) == before == shared_names(stock)
        assert model.lm_heads[1].out_features == model.lm_heads[1].weight.shape[0] == rows
        expected = stock.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    assert shared_names(BarkFineModel.from_pretrained(tmp_path)) == before
