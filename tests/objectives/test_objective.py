"""`use_tied_loss(model, objective=...)`: the loss of another objective by each model's own forward, or a refusal."""

import copy
import inspect
import logging as stdlib_logging
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_tying import TyingError, use_tied_loss
from hf_tying.models import TiedLSTMConfig, TiedLSTMForCausalLM
from hf_tying.objectives.deferred_logits import DeferredLogits
from hf_tying.objectives.objective import AugmentedObjective, ContrastiveObjective
from hf_tying.objectives.tied_loss import has_tied_loss, objective_of
from hf_tying.ties.groups import roles
from hf_tying.ties.slots import find_parameter
from hf_tying.training.objectives import ObjectiveArguments

from ..tiny import ALL, CAUSAL, COMPOSITE, VOCAB, WIDTH, tiny_inputs, tiny_model

CWT, AL = ContrastiveObjective(), AugmentedObjective(temperature=5.0, alpha=2.0)


@pytest.fixture
def told():
    messages = []
    handler = stdlib_logging.Handler()
    handler.emit = lambda record: messages.append((record.levelname, record.getMessage()))
    logger = stdlib_logging.getLogger("hf_tying")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(stdlib_logging.INFO)
    stdlib_logging.Logger.warning_once.cache_clear()
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


def without_dropout(model):
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def model_of(arch: str, **changes):
    """In float64, where its operations know that."""
    dtype = torch.float32 if arch == "mixtral" else torch.float64
    return without_dropout(tiny_model(arch, dtype=dtype, **changes))


def batch(model) -> dict:
    inputs = tiny_inputs(model)
    inputs["labels"][0, -3:] = -100
    inputs["labels"][1, 1] = inputs["labels"][1, 2]
    return inputs


class Product:
    """What a model multiplies by its softmax matrix, as it comes: `hidden`, `bias`, and the logits after all steps."""

    def __init__(self, model, inputs):
        model = copy.deepcopy(model)
        self.model = model
        head = find_parameter(model, roles(model)["output"][-1])
        linear, self.hidden = F.linear, None

        def watched(input, weight, bias=None):
            if weight is head:
                self.hidden = input
            return linear(input, weight, bias)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "linear", watched)
            self.logits = model(**inputs).logits
        self.embedding = find_parameter(model, roles(model)["target"][-1])
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
        return {name: p.grad for name, p in self.model.named_parameters()}


def step(model, inputs):
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs


def assert_same(model, outputs, expected: torch.Tensor, product: Product) -> None:
    """Loss, and the gradient of everything."""
    rtol = 1e-4 if expected.dtype == torch.float32 else 1e-6  # transformers computes its loss in float32
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=rtol)
    wanted = product.gradients(expected)
    found = {name: p.grad for name, p in model.named_parameters()}
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
    matrix = roles(model)["output"][-1]
    warnings = [message for level, message in told if level == "WARNING"]
    assert len(warnings) == 1 and matrix in warnings[0] and "does not learn" in warnings[0]


def test_no_product_with_the_vocabulary_is_computed():
    counts = []
    for words in (VOCAB, 5000):
        model = use_tied_loss(model_of("bert", vocab_size=words), objective=CWT)
        with FlopCounterMode(display=False) as flops:
            step(model, batch(model))
        counts.append(flops.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_the_options_reach_the_loss(monkeypatch):
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


def test_a_scale_or_cap_of_logits_is_left_out_and_said(told):
    model = model_of("gemma3_text", final_logit_softcapping=2.0)
    inputs = batch(model)
    product = Product(model, inputs)
    for _ in range(2):
        outputs = step(use_tied_loss(model, objective=CWT), inputs)
    assert_same(model, outputs, product.contrastive(), product)
    assert len([m for _, m in told if "soft cap" in m]) == 1


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


def test_what_would_be_unused_is_not_frozen_under_ddp_but_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = model_of("bert")
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(TyingError, match="cls.predictions.bias.*before the model is wrapped"):
            use_tied_loss(wrapped, objective=CWT)
        assert model.cls.predictions.bias.requires_grad and not has_tied_loss(model)
        wrapped = nn.parallel.DistributedDataParallel(model_of("gpt2"))  # with nothing to freeze
        inputs = batch(wrapped.module)
        assert step(use_tied_loss(wrapped, objective=CWT), inputs).logits is None
    finally:
        torch.distributed.destroy_process_group()


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
    matrix = find_parameter(product.model, roles(model)["output"][-1])
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


def test_options_of_the_augmented_loss_that_do_not_fit():
    model = model_of("gemma3_text", final_logit_softcapping=2.0)
    with pytest.raises(TyingError, match="logit_softcap"):
        step(use_tied_loss(model, objective=AL), batch(model))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [CWT, AL])
class TestNeverByCrossEntropyInstead:
    def test_an_adapter_on_the_head(self, objective):
        model = get_peft_model(model_of("gpt2", tie_word_embeddings=False), LoraConfig(target_modules=["lm_head"]))
        use_tied_loss(model, objective=objective)
        with pytest.raises(TyingError, match=type(objective).__name__):
            step(model, batch(model.get_base_model()))

    def test_an_adapter_elsewhere_is_fine(self, objective):
        model = get_peft_model(model_of("gpt2"), LoraConfig(target_modules=["c_attn"]))
        use_tied_loss(model, objective=objective)
        assert step(model, batch(model.get_base_model())).logits is None

    def test_a_head_that_is_another_matrix(self, objective):
        """transformers takes DeBERTa's layer before the product for its head."""
        model = model_of("deberta-v2", legacy=False)
        with pytest.raises(TyingError, match="needs its logits whole|of as many rows"):
            step(use_tied_loss(model, objective=objective), batch(model))

    def test_a_step_without_labels(self, objective):
        model = use_tied_loss(model_of("gpt2"), objective=objective)
        inputs = batch(model)
        del inputs["labels"]
        with pytest.raises(TyingError, match="no labels"):
            model(**inputs)
        with torch.no_grad():
            assert model(**inputs).logits is not None

    def test_label_smoothing_of_the_trainer(self, objective, tmp_path):
        model = use_tied_loss(model_of("gpt2"), objective=objective)
        args = TrainingArguments(tmp_path, label_smoothing_factor=0.1, max_steps=1, use_cpu=True, report_to="none")
        data = [{name: rows[0] for name, rows in tiny_inputs(model).items()}] * 2
        with pytest.raises(TyingError, match="label_smoothing_factor"):
            Trainer(model, args, train_dataset=data).train()

    def test_a_loss_of_another_kind(self, objective, monkeypatch):
        model = use_tied_loss(model_of("gpt2"), objective=objective)
        model.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
        with pytest.raises(TyingError, match="whole"):
            step(model, batch(model))

    def test_a_loss_with_a_term_of_the_whole_logits(self, objective):
        model = use_tied_loss(model_of("gpt2"), objective=objective)
        stock = model.loss_function
        model.loss_function = lambda logits, *args, **kwargs: (
            stock(logits, *args, **kwargs) + logits.logsumexp(-1).mean()
        )
        with pytest.raises(TyingError, match="logsumexp"):
            step(model, batch(model))

    def test_a_second_loss_over_words_that_is_not_of_the_hidden_states(self, objective):
        model = use_tied_loss(model_of("gpt2"), objective=objective)
        stock, other = model.loss_function, torch.randn(14, VOCAB)
        model.loss_function = lambda logits, labels, **kwargs: (
            stock(logits=logits, labels=labels, **kwargs) + F.cross_entropy(other, labels.view(-1))
        )
        with pytest.raises(TyingError, match="adapter on the head"):
            step(model, batch(model))

    def test_a_loss_that_asks_for_no_cross_entropy(self, objective):
        model = use_tied_loss(model_of("gpt2"), objective=objective)
        model.loss_function = lambda logits, labels, **kwargs: model.transformer.wpe.weight.sum()
        with pytest.raises(TyingError, match="asks for no cross entropy"):
            step(model, batch(model))

    def test_class_weights(self, objective):
        model = use_tied_loss(model_of("gpt2"), objective=objective)
        model.loss_function = lambda logits, labels, **kwargs: F.cross_entropy(
            logits.view(-1, VOCAB), labels.view(-1), weight=torch.ones(VOCAB, dtype=torch.float64)
        )
        with pytest.raises(TyingError, match="class_weight"):
            step(model, batch(model))

    def test_label_smoothing_and_backends(self, objective):
        for keyword in ({"label_smoothing": 0.1}, {"backend": "cce"}):
            with pytest.raises(TyingError, match=next(iter(keyword)).replace("_", ".")):
                use_tied_loss(model_of("gpt2"), objective=objective, **keyword)

    def test_an_embedding_of_another_size(self, objective):
        model = model_of("gpt2", tie_word_embeddings=False)
        wider, longer = nn.Embedding(VOCAB, WIDTH + 2), nn.Embedding(VOCAB + 1, WIDTH)
        model.set_input_embeddings(wider if objective is CWT else longer)
        with pytest.raises(TyingError, match="as wide|as many rows"):
            use_tied_loss(model, objective=objective)

    def test_nothing_whole_is_made_by_the_way(self, objective, monkeypatch):
        monkeypatch.setattr(DeferredLogits, "_logits", lambda self: pytest.fail("logits were made"))
        model = use_tied_loss(model_of("llama"), objective=objective)
        step(model, batch(model))


@pytest.mark.parametrize("objective", [CWT, AL])
def test_the_losses_of_single_tokens_are_refused(objective):
    model = use_tied_loss(model_of("gpt2"), objective=objective)
    model.loss_function = lambda logits, labels, **kwargs: F.cross_entropy(
        logits.view(-1, VOCAB), labels.view(-1), reduction="none"
    ).mean()
    with pytest.raises(TyingError, match="reduction='none'"):
        step(model, batch(model))


@pytest.mark.parametrize("wrong", ["cwt", ContrastiveObjective, 1])
def test_what_is_no_objective_is_refused(wrong):
    with pytest.raises(TyingError, match="expected an AugmentedObjective or a ContrastiveObjective"):
        use_tied_loss(model_of("gpt2"), objective=wrong)


@pytest.mark.parametrize(
    "make, what",
    [
        (lambda: ContrastiveObjective("all"), "'batch', 'unique', 'sampled'"),
        (lambda: ContrastiveObjective("sampled"), "num_sampled"),
        (lambda: ContrastiveObjective(temperature=-1.0), "above 0"),
        (lambda: AugmentedObjective(temperature=0.0), "above 0"),
        (lambda: AugmentedObjective(alpha=1.0, gamma=1.0), "expected one of them"),
        (lambda: AugmentedObjective(alpha=-1.0), "0 or more"),
    ],
)
def test_wrong_options_are_refused_where_the_objective_is_made(make, what):
    with pytest.raises(TyingError, match=what):
        make()


# --- the flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", None),
        (
            "--objective al --al_temperature 5 --al_gamma 0.5 --al_detach_target",
            AugmentedObjective(5.0, gamma=0.5, detach_target=True),
        ),
        ("--objective al --al_alpha 2", AugmentedObjective(alpha=2.0)),
        ("--objective cwt", ContrastiveObjective()),
        (
            "--objective cwt --cwt_negatives sampled --cwt_num_sampled 9 --cwt_temperature 0.5 --cwt_stop_gradient "
            "--cwt_gather",
            ContrastiveObjective("sampled", 9, 0.5, True, True),
        ),
    ],
)
def test_flags_are_an_objective(flags, expected):
    (arguments,) = HfArgumentParser(ObjectiveArguments).parse_args_into_dataclasses(flags.split())
    assert arguments.to_objective() == expected


def test_every_option_of_an_objective_has_a_flag():
    flags = inspect.signature(ObjectiveArguments).parameters
    for prefix, objective in (("al", AugmentedObjective), ("cwt", ContrastiveObjective)):
        options = {f"{prefix}_{name}": p.default for name, p in inspect.signature(objective).parameters.items()}
        assert options == {name: flags[name].default for name in flags if name.startswith(f"{prefix}_")}
