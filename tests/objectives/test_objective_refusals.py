"""An objective is refused where a step could only train by cross entropy instead."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from hf_tying import TyingError, use_tied_loss
from hf_tying.objectives.deferred_logits import DeferredLogits
from hf_tying.objectives.objective import AugmentedObjective, ContrastiveObjective

from ..tiny import VOCAB, WIDTH, tiny_inputs
from .helpers import AL, CWT, batch, model_of, step

every_objective = pytest.mark.parametrize("objective", [CWT, AL])


@every_objective
def test_an_objective_over_an_adapted_head_is_refused(objective):
    model = get_peft_model(model_of("gpt2", tie_word_embeddings=False), LoraConfig(target_modules=["lm_head"]))
    use_tied_loss(model, objective=objective)
    with pytest.raises(TyingError, match=type(objective).__name__):
        step(model, batch(model.get_base_model()))


@every_objective
def test_an_objective_under_an_adapter_elsewhere_trains(objective):
    model = get_peft_model(model_of("gpt2"), LoraConfig(target_modules=["c_attn"]))
    use_tied_loss(model, objective=objective)
    assert step(model, batch(model.get_base_model())).logits is None


@every_objective
def test_an_objective_over_a_head_that_is_another_matrix_is_refused(objective):
    """transformers takes DeBERTa's layer before the product for its head."""
    model = model_of("deberta-v2", legacy=False)
    with pytest.raises(TyingError, match="needs its logits whole|of as many rows"):
        step(use_tied_loss(model, objective=objective), batch(model))


@every_objective
def test_a_training_step_without_labels_is_refused(objective):
    model = use_tied_loss(model_of("gpt2"), objective=objective)
    inputs = batch(model)
    del inputs["labels"]
    with pytest.raises(TyingError, match="no labels"):
        model(**inputs)
    with torch.no_grad():
        assert model(**inputs).logits is not None


@every_objective
def test_label_smoothing_of_the_trainer_is_refused(objective, tmp_path):
    model = use_tied_loss(model_of("gpt2"), objective=objective)
    args = TrainingArguments(tmp_path, label_smoothing_factor=0.1, max_steps=1, use_cpu=True, report_to="none")
    data = [{name: rows[0] for name, rows in tiny_inputs(model).items()}] * 2
    with pytest.raises(TyingError, match="label_smoothing_factor"):
        Trainer(model, args, train_dataset=data).train()


@every_objective
def test_a_loss_function_of_another_kind_is_refused(objective):
    model = use_tied_loss(model_of("gpt2"), objective=objective)
    model.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    with pytest.raises(TyingError, match="whole"):
        step(model, batch(model))


@every_objective
def test_a_loss_function_with_a_term_of_the_whole_logits_is_refused(objective):
    model = use_tied_loss(model_of("gpt2"), objective=objective)
    stock = model.loss_function
    model.loss_function = lambda logits, *args, **kwargs: stock(logits, *args, **kwargs) + logits.logsumexp(-1).mean()
    with pytest.raises(TyingError, match="logsumexp"):
        step(model, batch(model))


@every_objective
def test_a_second_loss_over_words_that_is_not_of_the_hidden_states_is_refused(objective):
    model = use_tied_loss(model_of("gpt2"), objective=objective)
    stock, other = model.loss_function, torch.randn(14, VOCAB)
    model.loss_function = lambda logits, labels, **kwargs: (
        stock(logits=logits, labels=labels, **kwargs) + F.cross_entropy(other, labels.view(-1))
    )
    with pytest.raises(TyingError, match="adapter on the head"):
        step(model, batch(model))


@every_objective
def test_a_loss_function_that_asks_for_no_cross_entropy_is_refused(objective):
    model = use_tied_loss(model_of("gpt2"), objective=objective)
    model.loss_function = lambda logits, labels, **kwargs: model.transformer.wpe.weight.sum()
    with pytest.raises(TyingError, match="asks for no cross entropy"):
        step(model, batch(model))


@every_objective
def test_class_weights_are_refused(objective):
    model = use_tied_loss(model_of("gpt2"), objective=objective)
    model.loss_function = lambda logits, labels, **kwargs: F.cross_entropy(
        logits.view(-1, VOCAB), labels.view(-1), weight=torch.ones(VOCAB, dtype=torch.float64)
    )
    with pytest.raises(TyingError, match="class_weight"):
        step(model, batch(model))


@every_objective
def test_label_smoothing_and_backends_are_refused(objective):
    for keyword in ({"label_smoothing": 0.1}, {"backend": "cce"}):
        with pytest.raises(TyingError, match=next(iter(keyword)).replace("_", ".")):
            use_tied_loss(model_of("gpt2"), objective=objective, **keyword)


@every_objective
def test_an_embedding_of_another_size_is_refused(objective):
    model = model_of("gpt2", tie_word_embeddings=False)
    wider, longer = nn.Embedding(VOCAB, WIDTH + 2), nn.Embedding(VOCAB + 1, WIDTH)
    model.set_input_embeddings(wider if objective is CWT else longer)
    with pytest.raises(TyingError, match="as wide|as many rows"):
        use_tied_loss(model, objective=objective)


@every_objective
def test_the_logits_of_an_objective_are_never_made(objective, monkeypatch):
    monkeypatch.setattr(DeferredLogits, "_tensor", lambda self: pytest.fail("logits were made"))
    model = use_tied_loss(model_of("llama"), objective=objective)
    step(model, batch(model))


@every_objective
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
