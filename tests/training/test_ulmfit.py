"""What ULMFiT adds to `Trainer`, against the paper's equations, and on models of several architectures."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_tying import TyingError, tie
from hf_tying.metrics import calibration
from hf_tying.models import TiedLSTMConfig, TiedLSTMForCausalLM, TiedLSTMForSequenceClassification
from hf_tying.training import (
    GradualUnfreezing,
    TyingCallback,
    average_predictions,
    discriminative_parameters,
    distillation_labels,
    fit_temperature,
    layer_groups,
    pseudo_labels,
    recompute_norm_statistics,
    slanted_triangular,
    slanted_triangular_schedule,
)
from hf_tying.training.layers import restart

SMALL = {
    "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
GPT2 = {
    "vocab_size": 30,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "pad_token_id": 0,
    "num_labels": 3,
}
BART = {
    "vocab_size": 30, "d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 16,
}  # fmt: skip


def classifier(**changes) -> TiedLSTMForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "embedding_size": 6, "hidden_size": 6, "num_labels": 3, "pad_token_id": 0}
    return TiedLSTMForSequenceClassification(TiedLSTMConfig(**sizes | changes))


def language_model(**changes) -> TiedLSTMForCausalLM:
    torch.manual_seed(0)
    return TiedLSTMForCausalLM(TiedLSTMConfig(vocab_size=30, embedding_size=6, hidden_size=6, **changes))


def stock(kind: str, auto: type, **fields):
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(kind, **fields))


MODELS = {
    "lstm": (classifier, ["embeddings", "lstm.layers.0", "lstm.layers.1", "head"]),
    "bert": (
        lambda: stock("bert", AutoModelForSequenceClassification, **SMALL),
        ["embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "head"],
    ),
    "distilbert": (
        lambda: stock("distilbert", AutoModelForSequenceClassification, vocab_size=30, dim=8, n_layers=2, n_heads=2),
        ["embeddings", "distilbert.transformer.layer.0", "distilbert.transformer.layer.1", "head"],
    ),
    "gpt2": (
        lambda: stock("gpt2", AutoModelForSequenceClassification, **GPT2),
        ["embeddings", "transformer.h.0", "transformer.h.1", "head"],
    ),
    "tied lm": (
        language_model, ["lstm.layers.0", "lstm.layers.1", "head"],
    ),
    "untied lm": (
        lambda: language_model(tie_word_embeddings=False), ["embeddings", "lstm.layers.0", "lstm.layers.1", "head"],
    ),
    "bart": (
        lambda: stock("bart", AutoModelForSeq2SeqLM, **BART),
        ["embeddings", *(f"model.{side}.layers.{i}" for side in ("encoder", "decoder") for i in (0, 1)), "head"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_of_a_model_are_found_each_parameter_once(name):
    make, expected = MODELS[name]
    model = make()
    groups = layer_groups(model)
    assert list(groups) == expected
    found = [id(p) for members in groups.values() for p in members]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    for group, members in groups.items():
        inside = {id(p) for n, p in model.named_parameters() if n.startswith(f"{group}.")}
        assert inside <= {id(p) for p in members}
    output = model.get_output_embeddings()
    if output is not None:
        assert any(p is output.weight for p in groups["head"])
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and (output is None or module.weight is not output.weight):
            assert any(p is module.weight for p in groups["embeddings"])


def test_a_tied_matrix_is_in_the_head_also_where_the_head_comes_first():
    model = language_model()
    model._modules = dict(reversed(model._modules.items()))
    assert next(iter(model._modules)) == "lm_head"
    assert list(layer_groups(model)) == MODELS["tied lm"][1]


def test_layers_of_a_loaded_model_begin_again_as_those_of_a_new_one(tmp_path):
    stock("bert", AutoModelForSequenceClassification, **SMALL).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    groups = layer_groups(model)
    before = {id(p): p.clone() for p in model.parameters()}
    restart(model, groups["bert.encoder.layer.0"])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[id(p)])}
    assert changed == {n for n, p in model.named_parameters() if "layer.0." in n and p.ndim > 1}


def test_a_pooler_and_a_last_norm_belong_to_the_head():
    bert, gpt2 = MODELS["bert"][0](), MODELS["gpt2"][0]()
    assert {id(p) for p in bert.bert.pooler.parameters()} <= {id(p) for p in layer_groups(bert)["head"]}
    assert {id(p) for p in gpt2.transformer.ln_f.parameters()} <= {id(p) for p in layer_groups(gpt2)["head"]}


# --- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "cut_frac", "ratio"), [(100, 0.1, 32), (37, 0.3, 10), (1000, 0.02, 32)])
def test_slanted_triangular_rates_are_equation_3(steps, cut_frac, ratio):
    cut = math.floor(steps * cut_frac)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 0.4}, {"params": [model.bias], "lr": 0.1}])
    schedule = slanted_triangular_schedule(optimizer, steps, cut_frac, ratio)
    for t in range(steps):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
        for group, largest in zip(optimizer.param_groups, (0.4, 0.1), strict=True):
            assert group["lr"] == pytest.approx(largest * (1 + max(p, 0) * (ratio - 1)) / ratio, rel=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("steps", range(1, 12))
def test_few_steps_have_rates_too(steps):
    rates = [slanted_triangular(step, steps) for step in range(steps + 1)]
    assert all(1 / 32 <= rate <= 1 for rate in rates)
    with pytest.raises(TyingError, match="1 step or more"):
        slanted_triangular_schedule(torch.optim.SGD(classifier().parameters()), 0)


@pytest.mark.parametrize("name", MODELS)
def test_discriminative_rates_fall_by_a_factor_from_layer_to_layer(name):
    model = MODELS[name][0]()
    frozen = next(iter(layer_groups(model).values()))[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(discriminative_parameters(model, 0.01, weight_decay=0.1))
    rates = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    groups = list(layer_groups(model).values())
    for depth, members in enumerate(reversed(groups)):
        for parameter in members:
            if parameter is frozen:
                assert id(parameter) not in rates
                continue
            group = rates[id(parameter)]
            assert group["lr"] == pytest.approx(0.01 / 2.6**depth)
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0)


# --- gradual unfreezing ----------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self, labels: bool = True):
        draw = torch.Generator().manual_seed(0)
        self.ids, self.labels = torch.randint(1, 30, (8, 5), generator=draw), labels

    def __len__(self):
        return 8

    def __getitem__(self, row):
        ids = self.ids[row]
        return {"input_ids": ids, "labels": torch.tensor(row % 3) if self.labels else ids}


class Watch(TrainerCallback):
    """Which groups are trained, and which have changed, at each step."""

    def __init__(self):
        self.trained, self.changed, self.before = [], [], None

    def values(self, model):
        return {name: [p.detach().clone() for p in members] for name, members in layer_groups(model).items()}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = self.values(model)
        self.trained.append([n for n, members in layer_groups(model).items() if all(p.requires_grad for p in members)])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = self.values(model)
        different = [n for n in now if any(not torch.equal(a, b) for a, b in zip(self.before[n], now[n], strict=True))]
        self.changed.append(different)


def train(model, folder, *callbacks, resume=None, labels=True, **changes):
    watch = Watch()
    args = TrainingArguments(
        folder, per_device_train_batch_size=4, learning_rate=0.01, report_to="none", use_cpu=True, disable_tqdm=True,
        **{"num_train_epochs": 3, "save_strategy": "no", "weight_decay": 0.1} | changes,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=Rows(labels), callbacks=[*callbacks, watch])
    trainer.train(resume_from_checkpoint=resume)
    return watch


@pytest.mark.parametrize("name", ["lstm", "bert", "gpt2"])
def test_an_epoch_each_one_layer_more_is_trained_from_the_head_down(name, tmp_path):
    make, groups = MODELS[name]
    model = make()
    watch = train(model, tmp_path, GradualUnfreezing(), num_train_epochs=5)
    for step, (trained, changed) in enumerate(zip(watch.trained, watch.changed, strict=True)):
        expected = groups[max(0, len(groups) - 1 - step // 2) :]
        assert trained == expected and set(changed) == set(expected), step
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("every", [1, 0.25])
def test_a_stage_may_be_steps_or_a_share_of_them(every, tmp_path):
    groups = MODELS["lstm"][1]
    watch = train(classifier(), tmp_path, GradualUnfreezing(every=every), num_train_epochs=2)
    assert watch.trained == [groups[3 - min(step, 3) :] for step in range(4)]


def test_what_is_frozen_before_stays_frozen(tmp_path):
    model = classifier()
    model.lstm.embed_tokens.weight.requires_grad_(False)
    before = model.lstm.embed_tokens.weight.clone()
    train(model, tmp_path, GradualUnfreezing(every=1))
    assert torch.equal(model.lstm.embed_tokens.weight, before) and not model.lstm.embed_tokens.weight.requires_grad
    model.requires_grad_(False).classifier.requires_grad_(True)
    with pytest.raises(TyingError, match="found head"):
        train(model, tmp_path, GradualUnfreezing())
    with pytest.raises(TyingError, match="every=0"):
        GradualUnfreezing(every=0)


def test_unfreezing_goes_on_after_a_stop(tmp_path):
    whole, resumed = classifier(), classifier()
    train(whole, tmp_path, GradualUnfreezing(), save_strategy="steps", save_steps=3)
    watch = train(resumed, tmp_path, GradualUnfreezing(), resume=str(tmp_path / "checkpoint-3"))
    assert watch.trained[0] == MODELS["lstm"][1][2:]
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


# --- classifier first ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "bert", "tied lm"])
def test_a_cascade_freezes_from_the_head_down_and_begins_the_rest_again(name, tmp_path):
    make, groups = MODELS[name]
    model = make()
    watch = train(model, tmp_path, TyingCallback(cascade=[0.5, 0.25, 0.25]), labels=name != "tied lm", max_steps=8)
    expected = [groups] * 4 + [groups[:-1]] * 2 + [groups[:-2]] * 2
    assert watch.trained == expected and [set(c) for c in watch.changed] == [set(e) for e in expected]
    assert all(p.requires_grad for p in model.parameters())


def test_a_later_stage_begins_from_new_values_and_without_their_moments(tmp_path):
    seen = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            weight = model.lstm.layers[0].weight_hh_l0
            seen[state.global_step] = (weight.abs().max().item(), weight in optimizer.state)

    model = classifier(recurrent_initializer_range=1e-4)
    train(model, tmp_path, TyingCallback(cascade=2), Look(), max_steps=6)
    assert seen[2][0] > 5e-3 and seen[2][1]
    assert seen[3][0] <= 1e-4 and not seen[3][1]


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_cascade_goes_on_after_a_stop(step, tmp_path):
    whole, resumed = classifier(), classifier()
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    train(whole, tmp_path, TyingCallback(cascade=2), **options)
    checkpoint = str(tmp_path / f"checkpoint-{step}")
    train(resumed, tmp_path, TyingCallback(cascade=2), resume=checkpoint, **options | {"save_strategy": "no"})
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("cascade", "more", "message"),
    [
        (1, {}, "2 or more"),
        ([0.5, 0.4], {}, "sum to 1"),
        ([0.5, -0.5, 1.0], {}, "sum to 1"),
        ("head", {}, "expected the number"),
        (True, {}, "expected the number"),
        (2, {"freeze": "output"}, "neither freeze"),
        (2, {"untie_at": 3}, "neither freeze"),
    ],
)
def test_a_cascade_that_cannot_be_is_refused(cascade, more, message):
    with pytest.raises(TyingError, match=message):
        TyingCallback(cascade=cascade, **more)


def test_more_stages_than_layers_are_refused(tmp_path):
    with pytest.raises(TyingError, match="4 groups of layers"):
        train(classifier(), tmp_path, TyingCallback(cascade=5))


# --- statistics ------------------------------------------------------------------------------------------------------


def test_the_statistics_of_the_head_are_those_of_the_trained_values():
    model = classifier(classifier_dropout=0.5, output_dropout=0.5).train()
    rows = Rows().ids
    seen = []
    handle = model.classifier[0].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model.eval()(rows)
    handle.remove()
    batches = [{"input_ids": rows[:4], "labels": torch.zeros(4)}, {"input_ids": rows[4:]}]
    recompute_norm_statistics(model.train(), batches)
    norm = model.classifier[0]
    torch.testing.assert_close(norm.running_mean, seen[0].mean(dim=0))
    variance = torch.stack([seen[0][:4].var(dim=0), seen[0][4:].var(dim=0)]).mean(dim=0)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.momentum == 0.1 and model.training and norm.training
    model.eval()
    model.lstm.train()
    recompute_norm_statistics(model, batches)
    assert not model.training and not norm.training and model.lstm.training


@pytest.mark.parametrize("batches", [[], [[[1]]], [[[1], [2]], [["word"]]]], ids=["none", "of one text", "wrong"])
def test_statistics_that_cannot_be_measured_stay_as_they_were(batches):
    model = classifier()
    for norm in (model.classifier[0], model.classifier[4]):
        norm.running_mean.fill_(2)
        norm.num_batches_tracked.fill_(7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        recompute_norm_statistics(model, ({"input_ids": torch.tensor(ids)} for ids in batches))
    except ValueError:
        assert batches[-1] == [["word"]]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.classifier[0].momentum == 0.1 and model.training == classifier().training


# --- labels and probabilities ----------------------------------------------------------------------------------------


def test_the_temperature_is_the_one_with_the_smallest_cross_entropy():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 3, generator=draw, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits).probs.multinomial(1, generator=draw).flatten()
    found = fit_temperature(logits * 4, labels)
    losses = {t: float(F.cross_entropy(logits * 4 / t, labels)) for t in torch.linspace(1, 10, 2000).tolist()}
    assert found == pytest.approx(min(losses, key=losses.get), abs=0.01)
    before = calibration((logits * 4).softmax(1), labels).error
    assert calibration((logits * 4 / found).softmax(1), labels).error < before / 2
    several = (torch.rand(400, 3, generator=draw, dtype=torch.float64) < logits.sigmoid()).double()
    found = fit_temperature(logits * 4, several, multi_label=True)
    losses = {
        t: float(F.binary_cross_entropy_with_logits(logits * 4 / t, several))
        for t in torch.linspace(1, 10, 2000).tolist()
    }
    assert found == pytest.approx(min(losses, key=losses.get), abs=0.01)


def test_a_temperature_without_a_minimum_is_at_a_bound():
    logits = torch.eye(2)
    assert fit_temperature(logits, torch.tensor([0, 1])) == pytest.approx(0.1)
    assert fit_temperature(logits, torch.tensor([1, 0])) == pytest.approx(10)
    with pytest.raises(TyingError, match="finite"):
        fit_temperature(logits * float("nan"), torch.tensor([1, 0]))


def test_labels_that_a_model_makes():
    probabilities = torch.tensor([[0.95, 0.05], [0.6, 0.4], [0.1, 0.9]])
    rows, labels = pseudo_labels(probabilities, 0.9)
    assert rows.tolist() == [0, 2] and labels.tolist() == [0, 1]
    logits = torch.tensor([[2.0, 0.0]])
    soft = distillation_labels(logits, torch.tensor([1]), weight=0.25, temperature=2.0)
    share = 1 / (1 + math.e**-1)
    torch.testing.assert_close(soft, torch.tensor([[0.25 * share, 0.25 * (1 - share) + 0.75]]))
    torch.testing.assert_close(distillation_labels(logits), logits.softmax(1))
    mean = average_predictions([probabilities, probabilities.flip(0)])
    torch.testing.assert_close(mean[0], torch.tensor([0.525, 0.475]))


@pytest.mark.parametrize(
    "call",
    [
        lambda: pseudo_labels(torch.ones(1, 2), threshold=2),
        lambda: pseudo_labels(torch.full((1, 2), float("nan"))),
        lambda: pseudo_labels(torch.tensor([[4.0, -2.0]])),
        lambda: distillation_labels(torch.full((1, 2), float("nan"))),
        lambda: distillation_labels(torch.ones(1, 2), torch.tensor([2])),
        lambda: fit_temperature(torch.ones(1, 2), torch.tensor([-100])),
        lambda: distillation_labels(torch.ones(1, 2), weight=2),
        lambda: distillation_labels(torch.ones(1, 2), temperature=0),
        lambda: average_predictions([]),
        lambda: average_predictions([torch.ones(1, 2), torch.ones(2, 2)]),
        lambda: discriminative_parameters(classifier(), 0.0),
        lambda: discriminative_parameters(classifier().requires_grad_(False), 1.0),
    ],
)
def test_bad_values_are_refused(call):
    with pytest.raises(TyingError, match="expected"):
        call()


def test_a_tied_model_made_by_tie_has_its_embedding_in_the_head():
    model = stock("gpt2", AutoModelForCausalLM, **GPT2, tie_word_embeddings=False)
    assert "embeddings" in layer_groups(model)
    tie(model, "two_way", init_from="target")
    groups = layer_groups(model)
    assert any(p is model.lm_head.weight for p in groups["head"])
    assert [p is model.transformer.wpe.weight for p in groups["embeddings"]] == [True]
