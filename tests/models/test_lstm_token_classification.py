"""The classifier of words over the LSTM: its numbers one text at a time, its labels, its files and its training."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForTokenClassification, Trainer, TrainingArguments

from hf_tying import TyingError, assert_tied
from hf_tying.models import TiedLSTMForCausalLM, TiedLSTMForTokenClassification

from .test_lstm_classification import CLASSES, LENGTHS, WORDS, padded, texts, tiny_config


def tiny_classifier(**changes) -> TiedLSTMForTokenClassification:
    torch.manual_seed(0)
    return TiedLSTMForTokenClassification(tiny_config(**changes)).double().eval()


def one_at_a_time(model: TiedLSTMForTokenClassification, text: torch.Tensor) -> torch.Tensor:
    """The logits of one text, without padding, by `torch.nn.LSTM`."""
    backward = model.config.reads_backward
    hidden = model.lstm.embed_tokens.weight[text.flip(0) if backward else text]
    for layer in model.lstm.layers:
        plain = nn.LSTM(layer.input_size, layer.hidden_size, dtype=torch.float64)
        parameters = {name: getattr(layer, name) for name, _ in plain.named_parameters()}
        hidden, _ = torch.func.functional_call(plain, parameters, hidden)
    return model.classifier(hidden.flip(0) if backward else hidden)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_loss_and_gradients_are_those_of_each_text_alone(side, backward, masked):
    model = tiny_classifier(reads_backward=backward)
    ids, mask = padded(side)
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(CLASSES, ids.shape, generator=generator).masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask if masked else None, labels=labels)
    output.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    expected = torch.cat([one_at_a_time(model, text) for text in texts()])
    torch.testing.assert_close(output.logits[mask.bool()], expected)
    loss = F.cross_entropy(expected, labels[mask.bool()])
    torch.testing.assert_close(output.loss, loss.to(output.loss.dtype), atol=1e-6, rtol=1e-6)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-5)


def test_vectors_may_stand_for_words_and_the_temperature_divides_in_evaluation():
    model, (ids, mask) = tiny_classifier(), padded("right")
    vectors = model.lstm.embed_tokens(ids)
    logits = model(inputs_embeds=vectors, attention_mask=mask, return_dict=False)[0]
    torch.testing.assert_close(logits, model(ids).logits)
    model.config.temperature = 2.0
    torch.testing.assert_close(model(ids).logits * 2, logits)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"labels": torch.full((len(LENGTHS), 13), CLASSES)}, TyingError, "labels go from 3 to 3: expected 0 to 2"),
        ({"inputs_embeds": torch.zeros(len(LENGTHS), 13, 6)}, ValueError, "either input_ids or inputs_embeds"),
    ],
)
def test_what_does_not_fit_is_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        tiny_classifier()(padded("right")[0], **inputs)


def test_a_language_model_becomes_a_classifier_trains_and_is_read_again(tmp_path):
    language_model = TiedLSTMForCausalLM(tiny_config())
    language_model.save_pretrained(tmp_path / "lm")
    model, report = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "lm", num_labels=5, output_loading_info=True
    )
    assert type(model) is TiedLSTMForTokenClassification and model.classifier.out_features == 5
    expected = language_model.lstm.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.lstm.state_dict().items())
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert all(name.startswith("lm_head.") for name in report["unexpected_keys"])
    assert_tied(model)

    rows = [{"input_ids": text, "labels": text % 5} for text in texts()]

    def collate(rows):
        return {
            "input_ids": nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True),
            "labels": nn.utils.rnn.pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100),
        }

    def trained(size, accumulated):
        model = AutoModelForTokenClassification.from_pretrained(tmp_path / "lm", num_labels=5, classifier_dropout=0)
        with torch.no_grad():
            for parameter, value in zip(model.classifier.parameters(), head.parameters(), strict=True):
                parameter.copy_(value)
        args = TrainingArguments(
            tmp_path / "run", max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated,
            optim="sgd", learning_rate=0.5, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        Trainer(model, args, train_dataset=rows, data_collator=collate).train()
        return model

    head = model.classifier
    whole, parts = trained(4, 1), trained(2, 2)
    assert not torch.equal(whole.classifier.weight, head.weight)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, atol=1e-6, rtol=1e-5)
    whole.save_pretrained(tmp_path / "classifier")
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "classifier")
    ids = padded("right")[0]
    assert ids.max() < WORDS and torch.equal(again(ids).logits, whole.eval()(ids).logits)
