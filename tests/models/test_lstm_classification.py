"""The classifier over the LSTM: its numbers against the paper's equations, its labels, and its life in files."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_tying import TyingError, assert_tied
from hf_tying.data.words import train_word_level
from hf_tying.models import TiedLSTMConfig, TiedLSTMForCausalLM, TiedLSTMForSequenceClassification

WORDS, PAD, CLASSES = 40, 0, 3
LENGTHS = (3, 11, 1, 7)


def tiny_config(**changes) -> TiedLSTMConfig:
    sizes = {"vocab_size": WORDS, "embedding_size": 6, "hidden_size": 9, "pad_token_id": PAD, "num_labels": CLASSES}
    return TiedLSTMConfig(**sizes | changes)


def tiny_classifier(**changes) -> TiedLSTMForSequenceClassification:
    torch.manual_seed(0)
    model = TiedLSTMForSequenceClassification(tiny_config(**changes)).double()
    generator = torch.Generator().manual_seed(1)
    for module in model.classifier:  # statistics and scales that do something
        if isinstance(module, nn.BatchNorm1d):
            for part in (module.weight, module.bias, module.running_mean, module.running_var):
                part.data = torch.rand(part.shape, generator=generator, dtype=torch.float64) + 0.5
    return model


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, WORDS, (length,), generator=generator) for length in LENGTHS]


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.full((len(LENGTHS), 13), PAD), torch.zeros(len(LENGTHS), 13, dtype=torch.long)
    for row, text in enumerate(texts()):
        place = slice(0, len(text)) if side == "right" else slice(13 - len(text), 13)
        ids[row, place], mask[row, place] = text, 1
    return ids, mask


def by_the_paper(model: TiedLSTMForSequenceClassification, batch: list[torch.Tensor], train: bool = False):
    """Howard & Ruder 2018, equations of section 3.3, one text at a time by `torch.nn.LSTM`. No dropout."""
    features = []
    for text in batch:
        hidden = model.lstm.embed_tokens.weight[text.flip(0) if model.config.reads_backward else text]
        for layer in model.lstm.layers:
            plain = nn.LSTM(layer.input_size, layer.hidden_size, dtype=torch.float64)
            values = (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0)
            names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
            parameters = dict(zip(names, values, strict=True))
            hidden, _ = torch.func.functional_call(plain, parameters, hidden)
        parts = [hidden[-1], hidden.max(dim=0).values, hidden.mean(dim=0)]
        features.append(torch.cat(parts) if model.config.classifier_pooling == "concat" else hidden[-1])
    values = torch.stack(features)
    first_norm, _, first, _, second_norm, _, second = model.classifier
    for norm, linear in ((first_norm, first), (second_norm, second)):
        mean, variance = (
            (values.mean(0), values.var(0, correction=0)) if train else (norm.running_mean, norm.running_var)
        )
        values = (values - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
        values = values @ linear.weight.t() + linear.bias
        values = values.relu() if linear is first else values
    return values


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("pooling", ["concat", "last"])
def test_logits_and_gradients_are_those_of_the_paper(side, train, backward, pooling):
    rates = {"classifier_dropout": 0.0, "classifier_hidden_dropout": 0.0}
    model = tiny_classifier(reads_backward=backward, classifier_pooling=pooling, **rates).train(train)
    expected_model = copy.deepcopy(model)
    expected = by_the_paper(expected_model, texts(), train)
    labels = torch.tensor([0, 2, 1, 1])
    F.cross_entropy(expected, labels).backward()
    ids, mask = padded(side)
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected, rtol=1e-9, atol=1e-9)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), expected_model.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-12, msg=name)


def test_without_a_mask_the_padding_token_is_padding_and_vectors_may_stand_for_words():
    model, (ids, mask) = tiny_classifier().eval(), padded("right")
    expected = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    vectors = model.lstm.embed_tokens(ids)
    torch.testing.assert_close(model(inputs_embeds=vectors, attention_mask=mask).logits, expected)
    model.config.pad_token_id = None
    assert not torch.allclose(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("gradient_length", [1, 4, 5, 100])
@pytest.mark.parametrize("piece_length", [1, 3, 100])
def test_pieces_change_no_number_and_cut_the_gradient_at_the_last_words(gradient_length, piece_length):
    whole = tiny_classifier().eval()
    model = tiny_classifier(gradient_length=gradient_length, piece_length=piece_length).eval()
    ids, mask = padded("left")
    with torch.no_grad():
        torch.testing.assert_close(model(ids, mask).logits, whole(ids, mask).logits)
    vectors = model.lstm.embed_tokens(ids).detach().requires_grad_()
    logits = model(inputs_embeds=vectors, attention_mask=mask).logits
    torch.testing.assert_close(logits, whole(ids, mask).logits)
    logits.square().sum().backward()
    for row, length in enumerate(LENGTHS):
        piece = min(piece_length, gradient_length)
        pieces = -(-max(0, length - gradient_length) // piece)
        reached = vectors.grad[row, 13 - length :].abs().sum(dim=1) > 0
        assert reached.tolist() == [place >= pieces * piece for place in range(length)]
        assert 0 < int(reached.sum()) <= gradient_length


@pytest.mark.parametrize("grad", [True, False])
def test_pieces_are_read_under_autocast(grad):
    wide = {"initializer_range": 1.0, "recurrent_initializer_range": 1.0}  # texts differ by more than bfloat16 rounds
    model = tiny_classifier(gradient_length=4, piece_length=3, **wide).float().eval()
    ids, mask = padded("left")
    expected = model(ids, mask).logits
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        logits = model(ids, mask).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.008)


def test_a_long_text_is_read_in_bounded_memory():
    model = tiny_classifier(piece_length=10, gradient_length=20)
    seen = []
    model.lstm.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ids = torch.randint(1, WORDS, (2, 95))
    with torch.no_grad():
        model(ids)
    assert max(seen) == 10 and sum(seen) == 95
    seen.clear()
    model(ids).logits.sum().backward()
    assert max(seen) <= 20 and sum(seen) == 95


def test_one_text_in_a_batch_trains_by_the_running_statistics():
    model = tiny_classifier(classifier_dropout=0.0, classifier_hidden_dropout=0.0).train()
    before = model.classifier[0].running_mean.clone()
    text = texts()[1]
    torch.testing.assert_close(model(text[None]).logits, by_the_paper(model, [text]))
    assert torch.equal(model.classifier[0].running_mean, before)


def test_the_temperature_divides_the_logits_in_evaluation():
    model, ids = tiny_classifier(), padded("right")[0]
    model.eval()
    before = model(ids).logits
    model.config.temperature = 2.0
    torch.testing.assert_close(model(ids).logits, before / 2)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_the_problem_types_of_transformers_and_soft_labels():
    ids = padded("right")[0]
    soft = torch.tensor([[0.2, 0.8, 0], [1, 0, 0], [0.5, 0.25, 0.25], [0, 0, 1]], dtype=torch.float64)
    model = tiny_classifier(problem_type="single_label_classification").eval()
    logits = model(ids).logits
    expected = -(soft * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(model(ids, labels=soft).loss, expected)
    model = tiny_classifier().eval()
    hard = (soft > 0.3).double()
    torch.testing.assert_close(model(ids, labels=hard).loss, F.binary_cross_entropy_with_logits(logits, hard))
    assert model.config.problem_type == "multi_label_classification"
    model = tiny_classifier(num_labels=1).eval()
    torch.testing.assert_close(
        model(ids, labels=soft[:, 0]).loss, (model(ids).logits[:, 0] - soft[:, 0]).square().mean()
    )
    labels = torch.tensor([0, -100, 2, -100])
    model = tiny_classifier().eval()
    torch.testing.assert_close(model(ids, labels=labels).loss, F.cross_entropy(logits[::2], labels[::2]))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"labels": torch.tensor([0, 1, 2, 3])}, "expected 0 to 2"),
        ({"labels": torch.tensor([0, 1, -1, 2])}, "expected 0 to 2"),
        ({"labels": torch.full((4, 3), float("nan"))}, "NaN"),
        ({"labels": torch.zeros(4, 2)}, r"expected \(4, 3\)"),
        ({"attention_mask": torch.tensor([[1] * 13] * 3 + [[0] * 13])}, r"Texts \[3\]"),
        ({"attention_mask": torch.ones(4, 12)}, "attention mask has the shape"),
    ],
)
def test_what_does_not_fit_is_refused(inputs, message):
    model = tiny_classifier(problem_type="single_label_classification")
    with pytest.raises(TyingError, match=message):
        model(padded("right")[0], **inputs)


def test_whole_numbers_are_labels_of_several_classes_too():
    model = tiny_classifier(problem_type="multi_label_classification").eval()
    words, labels = torch.randint(1, 20, (4, 5)), torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1], [1, 1, 1]])
    assert torch.equal(model(words, labels=labels).loss, model(words, labels=labels.double()).loss)
    for bad in (labels[:, :2], labels + 1):
        with pytest.raises(TyingError, match="expected 0 or 1 for each class"):
            model(words, labels=bad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classifier_pooling": "mean"}, "concat, last"),
        ({"temperature": 0.0}, "above 0"),
        ({"gradient_length": 0}, "1 or more"),
        ({"classifier_dropout": 1.0}, r"rate in \[0, 1\)"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(TyingError, match=message):
        tiny_config(**changes)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"tying": {"version": 1, "scheme": "two_way", "projection": {}, "save_format": "portable"}},
        {"output_bias": False},
    ],
)
def test_a_language_model_becomes_a_classifier_and_says_what_it_leaves_out(changes, tmp_path):
    torch.manual_seed(0)
    language_model = TiedLSTMForCausalLM(tiny_config(**changes))
    language_model.save_pretrained(tmp_path / "lm")
    model, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "lm", num_labels=5, output_loading_info=True
    )
    assert type(model) is TiedLSTMForSequenceClassification and model.classifier[-1].out_features == 5
    expected = language_model.lstm.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.lstm.state_dict().items())
    assert all(name.startswith("classifier.") for name in report["missing_keys"])
    assert all(name.startswith("lm_head.") for name in report["unexpected_keys"])
    head = {f"lm_head.{name}" for name, _ in language_model.lm_head.named_parameters()}
    tied = language_model.lm_head.weight is language_model.lstm.embed_tokens.weight
    assert head - report["unexpected_keys"] <= ({"lm_head.weight"} if tied else set())
    assert_tied(model)

    model.save_pretrained(tmp_path / "classifier")
    again, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "classifier", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = padded("right")[0]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "classifier")
    assert (back.lm_head.weight is back.lstm.embed_tokens.weight) == tied


def test_training_goes_on_after_a_stop_as_without_it(tmp_path):
    data = [
        {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": i % CLASSES}
        for i, text in enumerate(texts() * 3)
    ]

    def collate(rows):
        ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=PAD)
        return {"input_ids": ids, "labels": torch.tensor([row["labels"] for row in rows])}

    def train(folder, resume=None, **changes):
        model = tiny_classifier(output_dropout=0.3, weight_dropout=0.2).float()
        args = TrainingArguments(
            folder, num_train_epochs=2, per_device_train_batch_size=5, save_steps=3, report_to="none",
            use_cpu=True, disable_tqdm=True, logging_steps=1, remove_unused_columns=False, **changes,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=data, data_collator=collate)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train(tmp_path / "a")
    resumed = train(tmp_path / "b", tmp_path / "a" / "checkpoint-3")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_the_pipeline_reads_a_saved_classifier(tmp_path):
    (tmp_path / "text.txt").write_text("how far is it ?\nwho was it ?\n", encoding="utf-8")
    tokenizer = train_word_level(tmp_path / "text.txt")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model = tiny_classifier(pad_token_id=tokenizer.pad_token_id, id2label={0: "a", 1: "b", 2: "c"}).float()
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    classify = pipeline("text-classification", model=str(tmp_path / "m"), top_k=None, device="cpu")
    together = classify(["who was it ?", "how far is it ? who was it ?", "who"], batch_size=3)
    alone = [classify(text)[0] for text in ("who was it ?", "how far is it ? who was it ?", "who")]
    for one, other in zip(together, alone, strict=True):
        assert {row["label"] for row in one} == {"a", "b", "c"}
        assert [row["score"] for row in one] == pytest.approx([row["score"] for row in other], abs=1e-6)


def test_deepcopy_resize_and_state_dict():
    model, ids = tiny_classifier().eval(), padded("right")[0]
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    twin.load_state_dict(model.state_dict())
    twin.resize_token_embeddings(WORDS + 4)
    assert twin.config.vocab_size == WORDS + 4 and torch.equal(twin(ids).logits, model(ids).logits)
