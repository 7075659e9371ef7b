"""PR: the penalty in both readings, the projection of any model with a softmax, in files, resized, and merged."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_tying import (
    TyingConfig,
    TyingError,
    assert_tied,
    merge_projection,
    tie,
    use_projection,
    use_tied_loss,
)
from hf_tying.config import ProjectionConfig
from hf_tying.losses import ProjectionPenalty, projection_penalty
from hf_tying.models import TiedLSTMConfig, TiedLSTMForCausalLM
from hf_tying.projection.head import ProjectedLinear

from ..tiny import logits, tiny_inputs, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_penalty_in_both_readings(dtype):
    p = torch.randn(5, 5).to(dtype).requires_grad_()
    exact = p.detach().double()
    code, text = projection_penalty(p), projection_penalty(p, norm="fro")
    assert float(code.detach()) == pytest.approx(float(exact.square().sum()) / 2 / 6.5, rel=1e-5)
    assert float(text.detach()) == pytest.approx(0.15 * float(exact.norm()), rel=1e-5)
    assert float(projection_penalty(p, strength=2.0, divisor=4).detach()) == pytest.approx(
        float(exact.square().sum()) / 4, rel=1e-5
    )
    (gradient,) = torch.autograd.grad(code, p)
    torch.testing.assert_close(gradient.double(), exact / 6.5, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert code.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ProjectionPenalty("fro", 0.3)(p, 2), 0.3 * exact.norm().to(code.dtype) / 2)


def test_the_penalty_of_the_papers_batch():
    """papers: mean CE + 1.92e-4 * ||P||^2 with 20 columns of 20 steps."""
    p = torch.randn(7, 7, dtype=torch.float64)
    assert float(projection_penalty(p, divisor=400)) == pytest.approx(1.923e-4 * float(p.square().sum()), rel=1e-3)


def test_a_projection_of_zeros_has_a_gradient_of_zeros():
    for norm in ("fro", "fro_squared_half"):
        p = torch.zeros(3, 3, requires_grad=True)
        projection_penalty(p, norm=norm).backward()
        assert not p.grad.any() and not p.grad.isnan().any()


@pytest.mark.parametrize("wrong", [{"norm": "l2"}, {"strength": -1.0}, {"strength": math.nan}])
def test_an_unknown_norm_or_strength_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        projection_penalty(torch.ones(2, 2), **wrong)
    with pytest.raises(ValueError, match="expected"):
        ProjectionPenalty(**wrong)
    with pytest.raises(TyingError, match="expected"):
        ProjectionConfig(**wrong)


@pytest.mark.parametrize("wrong", ["yes", {"lambda": 1}, {"strength": "big"}, {"bias": 1}, {"norm": ["fro"]}, 3])
def test_an_entry_that_cannot_be_read_is_refused(wrong):
    with pytest.raises(TyingError, match="rojection|norm"):
        TyingConfig.from_dict({"version": 1, "projection": wrong})


def test_the_entry_goes_through_a_dict_and_is_absent_where_there_is_none():
    config = TyingConfig("two_way", projection={"norm": "fro"})
    assert TyingConfig.from_dict(config.to_dict()) == config
    assert config.projection == ProjectionConfig(norm="fro") == TyingConfig(projection=config.projection).projection
    assert "projection" not in TyingConfig("two_way").to_dict()
    assert TyingConfig(projection=True).projection == ProjectionConfig()
    assert TyingConfig(projection=False).projection is None


ARCHITECTURES = ("gpt2", "llama", "qwen3", "gemma3_text", "mamba", "bert", "roberta")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_live_model_computes_what_it_did_until_it_is_trained(arch, tied):
    model = tiny_model(arch, tie_word_embeddings=tied)
    before, parameters = logits(model), model.num_parameters()
    assert use_projection(model) is model
    assert not any(part.training for part in model.modules())
    width = model.get_output_embeddings().in_features
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    assert model.num_parameters() == parameters + width * width + width
    assert_tied(model)
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared is tied


@pytest.mark.parametrize("arch", ["gpt2", "gemma3_text", "bert", "t5", "llava"])
@pytest.mark.parametrize("loss", ["stock", "tied"])
def test_a_training_step_has_the_penalty_and_says_so(arch, loss):
    model = tiny_model(arch)
    inputs = tiny_inputs(model)
    inputs["labels"][0, :3] = -100
    plain = copy.deepcopy(model).train()
    for module in (model, plain):
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            elif isinstance(getattr(part, "dropout", None), float):  # T5's attention
                part.dropout = 0.0
        module.config.attention_dropout = 0.0
    use_projection(model, strength=3.0, bias=False)
    if loss == "tied":
        use_tied_loss(model)
    model.train()
    expected = plain(**inputs).loss
    total = model(**inputs).loss
    labels = inputs["labels"] if arch in ("bert", "t5") else inputs["labels"][:, 1:]
    penalty = 3.0 * model.get_output_embeddings().in_features / 2 / (labels != -100).sum()  # of the identity
    torch.testing.assert_close(total, expected + penalty, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.loss_parts["projection"], penalty)
    torch.testing.assert_close(model.loss_parts["cross_entropy"], expected, rtol=1e-4, atol=1e-5)
    total.backward()
    assert model.get_output_embeddings().projection.weight.grad is not None
    model.eval()
    torch.testing.assert_close(model(**inputs).loss, plain.eval()(**inputs).loss, rtol=1e-4, atol=1e-5)
    assert not hasattr(model, "loss_parts")


def test_num_items_in_batch_divides_the_penalty_too():
    model = use_projection(tiny_model("gpt2"), strength=2.0).train()
    inputs = tiny_inputs(model)
    model(**inputs, num_items_in_batch=5)
    assert float(model.loss_parts["projection"]) == pytest.approx(model.config.n_embd / 5)
    loss, *_ = model(**inputs, num_items_in_batch=torch.tensor(5), return_dict=False)
    parts = model.loss_parts
    torch.testing.assert_close(loss.detach(), parts["cross_entropy"] + parts["projection"])


def test_labels_are_found_wherever_they_are_given():
    model = TiedLSTMForCausalLM(TiedLSTMConfig(vocab_size=9, embedding_size=5, hidden_size=5))
    use_projection(model, norm="fro", strength=3.0).train()
    ids = torch.arange(8).view(2, 4)
    norm = 3.0 * 5**0.5  # of the identity
    model(ids, None, None, None, ids)
    assert float(model.loss_parts["projection"]) == pytest.approx(norm / 6)  # the first words are not predicted
    model(input_ids=ids, shift_labels=ids)
    assert float(model.loss_parts["projection"]) == pytest.approx(norm / 8)
    with torch.no_grad():  # no training step, whatever the mode
        output = model(input_ids=ids, shift_labels=ids)
        torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), ids.flatten()))
    use_tied_loss(model)
    loss = model(input_ids=ids, shift_labels=torch.full_like(ids, -100)).loss
    assert float(loss.detach()) == pytest.approx(norm)  # divided by no word: as the loss, by 1


def test_the_parts_of_a_loss_with_other_penalties_add_up():
    sizes = {"vocab_size": 9, "embedding_size": 4, "hidden_size": 4, "initializer_range": 1.0}
    model = TiedLSTMForCausalLM(TiedLSTMConfig(**sizes, activation_regularization=2.0))
    ids = torch.arange(8).view(2, 4)
    output = use_projection(model).train()(input_ids=ids, labels=ids)
    parts = model.loss_parts
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(parts["cross_entropy"], expected.detach())
    assert parts.keys() == {"cross_entropy", "activation", "projection"}
    torch.testing.assert_close(output.loss.detach(), sum(parts.values()))


@pytest.mark.parametrize("arch", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_is_read_with_its_projection(tmp_path, arch, tied):
    model = use_projection(tiny_model(arch, tie_word_embeddings=tied), norm="fro", strength=0.5)
    with torch.no_grad():
        model.get_output_embeddings().projection.weight.normal_()
        model.get_output_embeddings().projection.bias.normal_()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert isinstance(again.get_output_embeddings(), ProjectedLinear)
    assert again.config.tying["projection"] == {"bias": True, "norm": "fro", "strength": 0.5}
    assert torch.equal(logits(again), logits(model))
    assert_tied(again)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) is tied


def test_declared_by_a_config_it_starts_as_the_models_other_matrices_do():
    model = tiny_model("llama", tying={"version": 1, "scheme": "two_way", "projection": {"bias": False}})
    head = model.get_output_embeddings()
    assert head.projection.bias is None and 0 < head.projection.weight.std() < 0.2
    assert not torch.equal(head.projection.weight, torch.eye(head.in_features))


@pytest.mark.parametrize("tied", [True, False])
def test_a_resize_keeps_the_projection(tied):
    model = use_projection(tiny_model("llama", tie_word_embeddings=tied))
    with torch.no_grad():
        model.lm_head.projection.weight.normal_()
    before = logits(model)
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 8)
    assert isinstance(model.lm_head, ProjectedLinear)
    torch.testing.assert_close(logits(model)[..., :rows], before)
    assert logits(model).shape[-1] == rows + 8


@pytest.mark.parametrize("arch", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("tied", [True, False])
def test_merged_the_logits_are_the_same_for_any_loader(tmp_path, arch, tied):
    model = use_projection(tiny_model(arch, tie_word_embeddings=tied), bias=arch == "bert")
    with torch.no_grad():
        model.get_output_embeddings().projection.weight.normal_()
        if arch == "bert":
            model.get_output_embeddings().projection.bias.normal_()
    before = logits(model)
    assert merge_projection(model) is model
    assert not any(part.training for part in model.modules())
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert model.config.tie_word_embeddings is False and "projection" not in model.config.tying
    assert_tied(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(TyingError, match="no projection"):
        merge_projection(model)


def test_what_is_frozen_stays_so_when_merged():
    model = use_projection(tiny_model("llama", tie_word_embeddings=False)).requires_grad_(False)
    assert not merge_projection(model).lm_head.weight.requires_grad


def test_a_bias_without_a_place_to_go_is_not_dropped():
    model = use_projection(tiny_model("llama"))
    merge_projection(copy.deepcopy(model))  # of a bias of zeros nothing is lost
    with torch.no_grad():
        model.lm_head.projection.bias.fill_(1.0)
    before = logits(model)
    with pytest.raises(TyingError, match="no bias|none to add it to"):
        merge_projection(model)
    assert torch.equal(logits(model), before)


def test_what_has_no_softmax_matrix_or_has_a_projection_is_refused():
    model = tiny_model("gpt2")
    for wrong in (model.transformer, nn.Linear(2, 2), None):
        with pytest.raises(TyingError, match="expected a (model with an nn.Linear|transformers PreTrainedModel)"):
            use_projection(wrong)
    use_projection(model)
    with pytest.raises(TyingError, match="has a projection already"):
        use_projection(model)


def test_ties_are_made_and_undone_beside_a_projection():
    model = use_projection(tiny_model("llama", tie_word_embeddings=False))
    tie(model, "two_way", init_from="target")
    assert_tied(model)
    assert model.config.tying["projection"] is not None and model.config.tying["scheme"] == "two_way"
    assert isinstance(model.lm_head, ProjectedLinear) and model.lm_head.weight is model.model.embed_tokens.weight


def test_a_copy_and_a_pickle_keep_it(tmp_path):
    model = use_projection(tiny_model("gpt2"))
    for twin in (copy.deepcopy(model), _through_a_file(model, tmp_path / "model.pt")):
        assert isinstance(twin.lm_head, ProjectedLinear)
        assert torch.equal(logits(twin), logits(model))
        assert_tied(twin)


def _through_a_file(model, path):
    torch.save(model, path)
    return torch.load(path, weights_only=False)


def test_the_base_model_of_a_file_with_a_projection_is_read(tmp_path):
    model = use_projection(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    from transformers import AutoModel

    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(body.embed_tokens.weight, model.model.embed_tokens.weight)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head, ProjectedLinear)


def test_the_projected_linear_by_its_definition():
    head = nn.Linear(4, 9)
    projected = ProjectedLinear.around(head, nn.Linear(4, 4))
    hidden = torch.randn(2, 3, 4)
    p = projected.projection
    expected = F.linear(hidden @ p.weight.t() + p.bias, head.weight, head.bias)
    torch.testing.assert_close(projected(hidden), expected)
    assert projected.weight is head.weight and projected.bias is head.bias


def test_an_adapter_on_a_projected_head_is_not_merged_into_another_function():
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(
        use_projection(tiny_model("llama", tie_word_embeddings=False)), LoraConfig(target_modules=["lm_head"])
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    before = logits(tuned)
    for merge in (tuned.merge_adapter, tuned.merge_and_unload):
        with pytest.raises(TyingError, match="before the projection"):
            merge()
    assert torch.equal(logits(tuned), before)
    beside = get_peft_model(use_projection(tiny_model("llama")), LoraConfig(target_modules=["q_proj"]))
    beside.merge_adapter()  # on another module it is none of the projection's business
