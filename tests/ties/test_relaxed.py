"""Relaxed tie groups: exact at the start, kept through a model's life, read by stock, hardened and untied."""

import copy
import json
import pickle

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_tying import (
    TyingConfig,
    TyingError,
    assert_tied,
    gap,
    harden,
    load_tied,
    relaxation_penalty,
    save_tied,
    tie,
    untie,
)
from hf_tying.config import RELAXATIONS
from hf_tying.peft import export_to_lora
from hf_tying.ties.relaxation import KINDS as CLASSES
from tests.tiny import logits, tiny_inputs, tiny_model

KINDS = {
    "scale": {"kind": "scale"},
    "lora": {"kind": "lora", "rank": 3},
    "basis": {"kind": "basis", "filters": 2},
    "bounded": {"kind": "lora", "rank": 3, "bound": 0.05},
}
each_kind = pytest.mark.parametrize("relax", KINDS.values(), ids=KINDS)
#: A model, the names of a group in it with the root first.
GROUPS = {
    "llama": ["model.embed_tokens.weight", "lm_head.weight"],
    "gpt2": ["transformer.wte.weight", "lm_head.weight"],
    "gpt2 layers": ["transformer.h.0.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.weight"],
    "bert": ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"],
    "t5": ["shared.weight", "lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"],
}
each_group = pytest.mark.parametrize("place", GROUPS)


def untouched(place):
    torch.manual_seed(0)
    return tiny_model(place.split()[0]).eval()


def relaxed(place, relax, names=None):
    names = names or GROUPS[place]
    return tie(untouched(place), {"group": {"names": names, "relax": relax}}, init_from=names[0]).eval()


def trained(place, relax):
    """A model whose differences are not zero any more."""
    model = relaxed(place, relax)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        model(**tiny_inputs(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(0 < distance for distance in gap(model)["group"].values())
    return model


@each_kind
@each_group
class TestALife:
    def test_it_starts_where_the_exact_tie_is(self, place, relax):
        exact = tie(untouched(place), {"group": GROUPS[place]}, init_from=GROUPS[place][0])
        model = relaxed(place, relax)
        assert torch.equal(logits(model), logits(exact))
        assert set(gap(model)["group"].values()) == {0.0} and relaxation_penalty(model) == 0

    def test_the_first_gradient_of_the_root_is_that_of_the_exact_tie(self, place, relax):
        exact = tie(untouched(place), {"group": GROUPS[place]}, init_from=GROUPS[place][0])
        model = relaxed(place, relax)
        for each in (exact, model):
            each(**tiny_inputs(each)).loss.backward()
        root = GROUPS[place][0]
        torch.testing.assert_close(model.get_parameter(root).grad, exact.get_parameter(root).grad)

    def test_every_copy_computes_the_same(self, place, relax):
        model = trained(place, relax)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()):
            assert_tied(other)
            assert torch.equal(logits(other), logits(model)) and gap(other) == gap(model)

    def test_a_file_gives_it_back(self, place, relax, tmp_path):
        model = trained(place, relax)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert_tied(loaded)
        assert torch.equal(logits(loaded), logits(model)) and gap(loaded) == gap(model)
        assert loaded.config.tying == model.config.tying
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.add_(1)
        loaded.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        assert_tied(loaded)
        assert torch.equal(logits(loaded), logits(model))

    def test_stock_reads_the_same_function(self, place, relax, tmp_path):
        model = trained(place, relax)
        model.save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        config = json.loads(file.read_text())
        del config["tying"]  # the hook does nothing for a config without it
        file.write_text(json.dumps(config))
        stock = type(untouched(place)).from_pretrained(tmp_path)
        torch.testing.assert_close(logits(stock), logits(model), atol=1e-6, rtol=1e-5)

    def test_state_dicts_go_both_ways(self, place, relax):
        model, other = trained(place, relax), relaxed(place, relax)
        other.load_state_dict(model.state_dict())
        assert torch.equal(logits(other), logits(model))
        other = relaxed(place, relax)
        other.load_state_dict(model.state_dict(), assign=True)
        assert_tied(other)
        assert torch.equal(logits(other), logits(model))

    def test_untied_it_computes_the_same(self, place, relax):
        model = trained(place, relax)
        before, names = logits(model), list(gap(model)["group"])
        untie(model, names)
        assert_tied(model)
        torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-5)
        assert not gap(model) and not any("relaxation" in name for name in model.state_dict())
        assert "relax" not in json.dumps(model.config.tying)

    def test_hardened_it_is_the_exact_tie_of_its_root(self, place, relax):
        model = trained(place, relax)
        exact = tie(untouched(place), {"group": GROUPS[place]}, init_from=GROUPS[place][0])
        exact.load_state_dict(model.state_dict(), strict=False)
        assert harden(model) is model
        assert_tied(model)
        assert torch.equal(logits(model), logits(exact))
        assert model.config.tying["version"] == 1 and model.config.tying["groups"] == exact.config.tying["groups"]
        assert getattr(model.config, "tie_word_embeddings", None) == getattr(exact.config, "tie_word_embeddings", None)


@each_kind
@pytest.mark.parametrize("place", ["llama", "gpt2", "bert"])
def test_a_resize_keeps_the_difference_of_each_word(place, relax):
    model = trained(place, relax)
    before, distance = logits(model), gap(model)
    rows = before.shape[-1]
    for size in (rows + 6, rows):
        model.resize_token_embeddings(size)
        assert_tied(model)
        assert logits(model).shape[-1] == size
        torch.testing.assert_close(logits(model)[..., :rows], before, atol=1e-6, rtol=1e-5)
    assert gap(model)["group"] == pytest.approx(distance["group"], rel=1e-4)


@each_kind
def test_the_flag_says_untied_and_the_file_has_whole_values(relax, tmp_path):
    model = trained("llama", relax)
    assert model.config.tie_word_embeddings is False
    assert model.config.tying["version"] == 2 and model.config.tying["save_format"] == "portable"
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    assert torch.equal(file["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(file["model.embed_tokens.weight"], model.get_parameter("model.embed_tokens.weight"))


def test_dedup_has_the_root_and_the_differences_alone(tmp_path):
    names = GROUPS["llama"]
    declared = TyingConfig(groups={"group": {"names": names, "relax": {"kind": "scale"}}}, save_format="dedup")
    model = tie(untouched("llama"), declared, init_from=names[0])
    model.get_parameter("lm_head.weight_relaxation.offset").data.fill_(0.5)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", RELAXATIONS)
def test_a_setting_that_is_left_out_has_the_default_that_the_config_names(kind):
    model = relaxed("llama", {"kind": kind})
    held = model.lm_head.weight_relaxation
    relax = {"kind": kind, "bound": None, **RELAXATIONS[kind]}
    tie(model, {"group": {"names": GROUPS["llama"], "relax": relax}})
    assert type(held) is CLASSES[kind] and model.lm_head.weight_relaxation is held
    assert held.settings | RELAXATIONS[kind] == {"kind": kind, **RELAXATIONS[kind]}


def test_each_kind_is_its_formula():
    root = untouched("llama").get_parameter("model.embed_tokens.weight")
    for kind, relax in KINDS.items():
        model = trained("llama", relax)
        root = model.get_parameter("model.embed_tokens.weight")
        parts = dict(model.lm_head.weight_relaxation.named_parameters())
        if kind == "scale":
            expected = torch.diag(1 + parts["offset"]) @ root
        elif kind == "basis":
            own, first, second = parts["coefficients"]
            expected = (1 + own) * root + first * parts["filters"][0] + second * parts["filters"][1]
        else:
            difference = parts["lora_B"] @ parts["lora_A"]
            most = relax.get("bound", float("inf")) * root.norm()
            expected = root + difference * min(1, most / difference.norm())
        torch.testing.assert_close(model.lm_head.weight, expected)


def test_a_bound_is_never_passed():
    model = relaxed("llama", {"kind": "scale", "bound": 0.1})
    offset = model.get_parameter("lm_head.weight_relaxation.offset")
    for value, expected in ((0.05, 0.05), (0.1, 0.1), (7.0, 0.1)):
        offset.data.fill_(value)
        assert gap(model)["group"]["lm_head.weight"] == pytest.approx(expected, rel=1e-5)


def test_a_bounded_difference_of_a_zero_matrix_is_zero():
    model = untouched("llama")
    for name in GROUPS["llama"]:
        model.get_parameter(name).data.zero_()
    tie(model, {"group": {"names": GROUPS["llama"], "relax": KINDS["bounded"]}})
    assert not model.lm_head.weight.any()


def test_a_group_has_the_name_that_was_given_last():
    model = tie(untouched("llama"), "two_way", init_from="target")
    tie(model, {"mine": {"names": GROUPS["llama"], "relax": KINDS["scale"]}})
    assert list(gap(model)) == ["mine"]


def test_the_penalty_is_the_squared_gap_and_leaves_the_root_alone():
    model = trained("llama", KINDS["lora"])
    penalty = relaxation_penalty(model)
    assert penalty.item() == pytest.approx(gap(model)["group"]["lm_head.weight"] ** 2, rel=1e-5)
    penalty.backward()
    assert model.get_parameter("model.embed_tokens.weight").grad is None
    assert model.get_parameter("lm_head.weight_relaxation.lora_B").grad.norm() > 0
    assert relaxation_penalty(untouched("llama")) == 0


class TestValuesThatDiffer:
    NAMES = ("model.embed_tokens.weight", "lm_head.weight")

    def model(self):
        return untie(untouched("llama"))

    def differing(self):
        model = self.model()
        torch.nn.init.normal_(model.lm_head.weight)
        return model

    def test_need_a_choice_as_everywhere(self):
        with pytest.raises(TyingError, match="init_from="):
            tie(self.differing(), {"group": {"names": [*self.NAMES], "relax": {"kind": "scale"}}})

    def test_are_approximated_better_by_a_higher_rank_and_met_by_the_full_one(self):
        stock, errors = self.differing(), []
        for rank in (1, 4, 8, 16):
            relax = {"kind": "lora", "rank": rank, "init": "svd"}
            model = tie(copy.deepcopy(stock), {"group": {"names": [*self.NAMES], "relax": relax}}, init_from="target")
            residual = stock.lm_head.weight - stock.model.embed_tokens.weight
            best = torch.linalg.svdvals(residual.double())[rank:].norm().item()
            found = (model.lm_head.weight - stock.lm_head.weight).double().norm().item()
            assert found == pytest.approx(best, rel=1e-4, abs=1e-4)
            errors.append(found)
        assert errors == sorted(errors, reverse=True)
        torch.testing.assert_close(logits(model), logits(stock), atol=1e-4, rtol=0)

    def test_of_whole_layers_are_met_by_the_full_rank(self):
        stock = untouched("llama")
        for name, parameter in stock.named_parameters():
            if "layers.1" in name and parameter.ndim == 1:
                parameter.data.copy_(stock.get_parameter(name.replace("layers.1", "layers.0")))
        relax = {"kind": "lora", "rank": 32, "init": "svd"}
        layers = ["model.layers.0", "model.layers.1"]
        model = tie(copy.deepcopy(stock), {"layers": {"names": layers, "relax": relax}}, init_from="model.layers.0")
        torch.testing.assert_close(logits(model), logits(stock), atol=1e-4, rtol=0)
        assert all("norm" not in name for group in gap(model).values() for name in group)  # vectors are tied exactly


class TestAsLora:
    @pytest.mark.parametrize("root", [0, 1], ids=["head relaxed", "embedding relaxed"])
    def test_stock_peft_computes_the_same_over_the_exact_tie(self, root, tmp_path):
        names = GROUPS["llama"][root:] + GROUPS["llama"][:root]
        model = relaxed("llama", KINDS["lora"], names)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        export_to_lora(model, tmp_path / "adapter")
        base = harden(copy.deepcopy(model))
        assert not torch.allclose(logits(base), logits(model), atol=1e-3)
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
        torch.testing.assert_close(logits(adapted), logits(model), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("kind", ["scale", "basis", "bounded"])
    def test_another_kind_is_refused_before_anything_is_written(self, kind, tmp_path):
        with pytest.raises(TyingError, match="expected the weight of a Linear or an Embedding, relaxed by 'lora'"):
            export_to_lora(relaxed("llama", KINDS[kind]), tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()


class Filters(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(2, 2, 3) for _ in range(3))

    def forward(self, image):
        return self.third(self.second(self.first(image)))


FILTERS = ["first.weight", "second.weight", "third.weight"]


@each_kind
class TestAPlainModule:
    def module(self, relax):
        torch.manual_seed(0)
        module = tie(Filters(), {"filters": {"names": FILTERS, "relax": relax}}, init_from="first.weight")
        for name, parameter in module.named_parameters():
            if "relaxation" in name:
                torch.nn.init.normal_(parameter)
        return module

    def test_is_saved_and_loaded(self, relax, tmp_path):
        module, image = self.module(relax), torch.randn(1, 2, 9, 9)
        save_tied(module, tmp_path)
        loaded = load_tied(Filters(), tmp_path)
        assert_tied(loaded)
        assert torch.equal(loaded(image), module(image)) and gap(loaded) == gap(module)
        stock = Filters()
        stock.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        torch.testing.assert_close(stock(image), module(image), atol=1e-5, rtol=1e-5)

    def test_a_name_is_untied_alone(self, relax):
        module, image = self.module(relax), torch.randn(1, 2, 9, 9)
        before = module(image)
        untie(module, ["second.weight"])
        assert_tied(module)
        assert list(gap(module)["filters"]) == ["third.weight"]
        torch.testing.assert_close(module(image), before, atol=1e-5, rtol=1e-5)

    def test_a_file_that_does_not_fit_changes_nothing(self, relax, tmp_path):
        save_tied(self.module(relax), tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        save_file({**tensors, "other": torch.zeros(1)}, tmp_path / "model.safetensors")
        target = Filters()
        before = {name: value.clone() for name, value in target.state_dict().items()}
        with pytest.raises(TyingError, match="'other'"):
            load_tied(target, tmp_path)
        assert before.keys() == target.state_dict().keys() and type(target.second) is nn.Conv2d
        assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_members_share_the_filters_of_a_basis():
    module = tie(
        Filters(), {"filters": {"names": FILTERS, "relax": {"kind": "basis", "filters": 1}}}, init_from="first.weight"
    )
    assert module.second.weight_relaxation.filters is module.third.weight_relaxation.filters
    assert module.second.weight_relaxation.coefficients is not module.third.weight_relaxation.coefficients


def test_a_trainer_keeps_it_and_resumes(tmp_path):
    def trainer(steps):
        torch.manual_seed(0)
        model = relaxed("llama", KINDS["lora"])
        arguments = TrainingArguments(
            tmp_path, max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant",
        )  # fmt: skip
        rows = [
            {"input_ids": row, "labels": row} for row in torch.randint(3, 60, (8, 6), generator=torch.manual_seed(1))
        ]
        return Trainer(model, arguments, train_dataset=rows)

    whole = trainer(4)
    whole.train()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_tied(resumed.model)
    assert torch.equal(logits(resumed.model.eval()), logits(whole.model.eval()))
    assert gap(resumed.model)["group"]["lm_head.weight"] > 0


def test_a_difference_that_a_file_lacks_is_zero_and_reported(tmp_path, caplog):
    trained("llama", KINDS["lora"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if "relaxation" not in name},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert gap(AutoModelForCausalLM.from_pretrained(tmp_path))["group"] == {"lm_head.weight": 0.0}


class TestRefusals:
    def test_a_file_without_the_root(self, tmp_path):
        trained("llama", KINDS["lora"]).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["model.embed_tokens.weight"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(TyingError, match="its root 'model.embed_tokens.weight' is not there"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(TyingError, match="is not there"):
            relaxed("llama", KINDS["lora"]).load_state_dict(tensors, strict=False)

    def test_another_relaxation_of_the_same_name_and_its_ways_out(self):
        model = relaxed("llama", KINDS["scale"])
        other = {"group": {"names": GROUPS["llama"], "relax": KINDS["lora"]}}
        with pytest.raises(TyingError, match="Call harden"):
            tie(model, other)
        assert gap(tie(harden(model), other)) == {"group": {"lm_head.weight": 0.0}}

    def test_a_root_that_leaves(self):
        module = tie(Filters(), {"filters": {"names": FILTERS, "relax": {"kind": "scale"}}}, init_from="first.weight")
        with pytest.raises(TyingError, match="harden"):
            untie(module, ["first.weight"])
        untie(harden(module), ["first.weight"])

    def test_another_head(self):
        model = relaxed("llama", KINDS["scale"])
        with pytest.raises(TyingError, match="is relaxed"):
            model.set_output_embeddings(nn.Linear(16, 64, bias=False))
        untie(model).set_output_embeddings(nn.Linear(16, 64, bias=False))

    def test_a_low_rank_of_a_vector(self):
        names = ["model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"]
        with pytest.raises(TyingError, match="Use the kind 'scale'"):
            tie(untouched("llama"), {"norms": {"names": names, "relax": {"kind": "lora"}}}, init_from=names[0])
        tie(untouched("llama"), {"norms": {"names": names, "relax": {"kind": "scale"}}}, init_from=names[0])

    @pytest.mark.parametrize(
        "value",
        [
            {"kind": "other"}, {"kind": ["scale"]}, {}, 3, {"kind": "lora", "rank": 0},
            {"kind": "lora", "rank": 10**9},
            {"kind": "lora", "rank": True}, {"kind": "scale", "rank": 2}, {"kind": "scale", "bound": float("nan")},
            {"kind": "scale", "bound": -1}, {"kind": "lora", "init": "other"}, {"kind": "basis", "filters": 1.5},
        ],
        ids=str,
    )  # fmt: skip
    def test_settings(self, value):
        with pytest.raises(TyingError, match="expected"):
            TyingConfig(groups={"group": {"names": ["a", "b"], "relax": value}})

    def test_other_keys_of_a_group(self):
        with pytest.raises(TyingError, match='parameter names, or a dict {"names"'):
            TyingConfig(groups={"group": {"names": ["a", "b"], "relaxed": {"kind": "scale"}}})

    def test_an_older_version_says_so(self):
        entry = TyingConfig(groups={"group": {"names": ["a", "b"], "relax": {"kind": "scale"}}}).to_dict()
        assert entry["version"] == 2 and TyingConfig.from_dict(entry).to_dict() == entry
        with pytest.raises(TyingError, match="reads up to version 2"):
            TyingConfig.from_dict({**entry, "version": 3})
