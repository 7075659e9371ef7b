"""`use_tied_loss(model, objective=...)` trains each model by that objective, through the model's own forward."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hf_tying import TyingError, use_tied_loss
from hf_tying.models import TiedLSTMConfig, TiedLSTMForCausalLM
from hf_tying.objectives.objective import ContrastiveObjective
from hf_tying.objectives.tied_loss import has_tied_loss, objective_of
from hf_tying.ties.anatomy import roles
from hf_tying.ties.slots import find_parameter

from ..tiny import ALL, CAUSAL, COMPOSITE, VOCAB
from .helpers import AL, CWT, batch, gradients, model_of, step


class Product:
    """What a model multiplies by its softmax matrix, as it comes: `hidden`, `bias`, and the logits after all steps."""

    def __init__(self, model, inputs):
        model = copy.deepcopy(model)
        self.model = model
        head = find_parameter(model, roles(model)["output"].name)
        linear, self.hidden = F.linear, None

        def watched(input, weight, bias=None):
            if weight is head:
                self.hidden = input
            return linear(input, weight, bias)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "linear", watched)
            self.logits = model(**inputs).logits
        self.embedding = find_parameter(model, roles(model)["target"].name)
        self.labels = inputs["labels"]
        if model.config.model_type in CAUSAL + COMPOSITE:
            self.hidden, self.labels = self.hidden[:, :-1], self.labels[:, 1:]
            self.logits = self.logits[:, :-1]
        counts = self.labels != -100
        self.hidden, self.labels, self.logits = self.hidden[counts], self.labels[counts], self.logits[counts]

    def contrastive(self, temperature: float = 1.0) -> torch.Tensor:
        products = self.hidden @ self.embedding[self.labels].T / temperature
        return F.cross_entropy(products, torch.arange(len(products)))

    def gradients(self, loss: torch.Tensor) -> dict:
        loss.backward()
        return gradients(self.model)


def assert_same(model, outputs, expected: torch.Tensor, product: Product) -> None:
    """Loss, and the gradient of everything."""
    rtol = 1e-4 if expected.dtype == torch.float32 else 1e-6  # transformers computes its loss in float32
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=rtol)
    wanted = product.gradients(expected)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    none = {name for name, gradient in wanted.items() if gradient is None}
    assert {name for name, gradient in found.items() if gradient is None} == none
    largest = max(gradient.abs().max() for gradient in wanted.values() if gradient is not None)
    for name in wanted.keys() - none:
        assert (found[name] - wanted[name]).abs().max() < 10 * rtol * largest, name


# --- contrastive weight tying ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ALL)
def test_a_step_of_every_architecture_is_contrastive(arch):
    model = model_of(arch)
    inputs = batch(model)
    product = Product(model, inputs)
    outputs = step(use_tied_loss(model, objective=CWT), inputs)
    assert_same(model, outputs, product.contrastive(), product)
    assert outputs.logits is None
    assert model.loss_parts.keys() == {"contrastive"}
    assert model.loss_parts["contrastive"].item() == outputs.loss.item()
    assert not model.loss_parts["contrastive"].requires_grad


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_an_untied_model_is_contrastive_by_its_input_embedding(arch, told):
    model = model_of(arch, tie_word_embeddings=False)
    inputs = batch(model)
    product = Product(model, inputs)
    use_tied_loss(model, objective=ContrastiveObjective(temperature=0.5))
    assert_same(model, step(model, inputs), product.contrastive(0.5), product)
    matrix = roles(model)["output"].name
    assert len(told) == 1 and matrix in told[0] and "does not learn" in told[0]


def test_contrastive_tying_computes_no_product_with_the_vocabulary():
    counts = []
    for words in (VOCAB, 5000):
        model = use_tied_loss(model_of("bert", vocab_size=words), objective=CWT)
        with FlopCounterMode(display=False) as flops:
            step(model, batch(model))
        counts.append(flops.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_the_options_of_an_objective_reach_its_loss():
    model = model_of("gpt2")
    inputs = batch(model)
    product = Product(model, inputs)
    use_tied_loss(model, objective=ContrastiveObjective("unique", temperature=2.0, stop_gradient=True))
    words, place = product.labels.unique(return_inverse=True)
    expected = F.cross_entropy(product.hidden @ product.embedding[words].detach().T / 2, place)
    assert_same(model, step(model, inputs), expected, product)


def test_items_of_accumulated_steps_divide_loss_and_parts():
    model = use_tied_loss(model_of("gpt2"), objective=CWT)
    inputs = batch(model)
    mean = step(model, inputs).loss.item()
    counted = (inputs["labels"][:, 1:] != -100).sum().item()
    loss = step(model, inputs | {"num_items_in_batch": torch.tensor(40)}).loss.item()
    assert loss == pytest.approx(mean * counted / 40)
    assert model.loss_parts["contrastive"].item() == pytest.approx(loss)


def test_a_scale_or_cap_of_the_logits_is_left_out_of_contrastive_tying_and_the_log_tells_once(told):
    model = model_of("gemma3_text", final_logit_softcapping=2.0)
    inputs = batch(model)
    product = Product(model, inputs)
    for _ in range(2):
        outputs = step(use_tied_loss(model, objective=CWT), inputs)
    assert_same(model, outputs, product.contrastive(), product)
    assert len([m for m in told if "soft cap" in m]) == 1


def test_shift_labels_are_labels_and_a_models_own_penalty_is_a_part():
    config = TiedLSTMConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, activation_regularization=2.0, eos_token_id=0
    )
    model = use_tied_loss(TiedLSTMForCausalLM(config).train(), objective=CWT)
    ids = torch.randint(30, (2, 6))
    loss = step(model, {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}).loss
    assert model.loss_parts.keys() == {"contrastive", "activation"}
    assert sum(model.loss_parts.values()).item() == pytest.approx(loss.item())


def test_biases_of_the_head_are_frozen_until_the_objective_is_gone():
    model = model_of("bert")
    bias = model.cls.predictions.bias
    use_tied_loss(use_tied_loss(model, objective=CWT), objective=CWT)
    assert not bias.requires_grad and model.get_input_embeddings().weight.requires_grad
    assert objective_of(model) == CWT
    use_tied_loss(model)
    assert bias.requires_grad and objective_of(model) is None and has_tied_loss(model)
    bias.requires_grad_(False)
    use_tied_loss(model, objective=CWT)
    use_tied_loss(model, False)
    assert not bias.requires_grad  # as it was before
    assert not has_tied_loss(model) and "loss_parts" not in vars(model)


def test_evaluation_generation_and_files_are_as_before(tmp_path):
    stock = model_of("gpt2")
    model = use_tied_loss(copy.deepcopy(stock), objective=CWT)
    inputs = batch(model)
    for each in (stock, model):
        each.eval()
    assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    assert torch.equal(model(**inputs).loss, stock(**inputs).loss)
    model.save_pretrained(tmp_path)
    loaded = type(stock).from_pretrained(tmp_path, dtype=torch.float64)
    assert objective_of(loaded) is None and torch.allclose(loaded(**inputs).logits, stock(**inputs).logits)
    copied = pickle.loads(pickle.dumps(model))
    assert objective_of(copied) == CWT and objective_of(copy.deepcopy(model)) == CWT


# --- the augmented loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, tied", [("gpt2", True), ("bert", True), ("llama", False), ("t5", True)])
def test_a_step_has_the_augmented_loss_of_its_hidden_states(arch, tied):
    model = model_of(arch, tie_word_embeddings=tied)
    inputs = batch(model)
    product = Product(model, inputs)
    outputs = step(use_tied_loss(model, objective=AL), inputs)
    matrix = find_parameter(product.model, roles(model)["output"].name)
    cross_entropy = F.cross_entropy(product.logits, product.labels)
    target = (product.embedding[product.labels] @ product.embedding.T / 5).softmax(-1)
    divergence = F.kl_div((product.hidden @ matrix.T / 5).log_softmax(-1), target, reduction="batchmean")
    assert_same(model, outputs, cross_entropy + 2 * divergence, product)
    assert model.loss_parts["cross_entropy"].item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert model.loss_parts["augmented"].item() == pytest.approx(2 * divergence.item(), rel=1e-4)


def test_the_augmented_loss_of_accumulated_steps_is_divided_alike():
    model = use_tied_loss(model_of("gpt2"), objective=AL)
    inputs = batch(model)
    loss = step(model, inputs | {"num_items_in_batch": 40}).loss.item()
    assert sum(model.loss_parts.values()).item() == pytest.approx(loss)
    assert loss == pytest.approx(step(model, inputs).loss.item() * (inputs["labels"][:, 1:] != -100).sum().item() / 40)


def test_the_augmented_loss_of_capped_logits_is_refused():
    model = model_of("gemma3_text", final_logit_softcapping=2.0)
    with pytest.raises(TyingError, match="logit_softcap"):
        step(use_tied_loss(model, objective=AL), batch(model))
