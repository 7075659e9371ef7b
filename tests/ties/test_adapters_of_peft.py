"""PEFT's own ways to train a tied embedding: what it keeps as one is tied, what it parts is told; beside stock."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_tying import TyingCallback, TyingError, assert_tied, tie, untie

from ..forms import tied_model
from ..native_adapters import ADD_ADAPTER
from ..tiny import Sentences, tiny_inputs, tiny_model

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = dict(target_modules=["q_proj"])
#: What an adapter trains, where PEFT keeps one matrix for both sides, or leaves the matrix as it is.
KEPT = {
    "lora elsewhere": QUERY,
    "lora on the embedding": dict(target_modules=["embed_tokens"]),
    "lora on the head": dict(target_modules=["lm_head"]),
    "lora on both": dict(target_modules=["embed_tokens", "lm_head"]),
    "one lora for both": dict(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "dora on the head": dict(target_modules=["lm_head"], use_dora=True),
    "tokens": QUERY | dict(trainable_token_indices=[1, 5]),
    "tokens of the embedding": QUERY | dict(trainable_token_indices={"embed_tokens": [1, 5]}),
    "tokens of the head": QUERY | dict(trainable_token_indices={"lm_head": [1, 5]}),
    "tokens of both": QUERY | dict(trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [1, 5]}),
    "tokens, ensured": QUERY | dict(trainable_token_indices=[1, 5], ensure_weight_tying=True),
    "one copy": QUERY | dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "one copy, by the head": QUERY | dict(modules_to_save=["lm_head"], ensure_weight_tying=True),
    "a copy of another module": QUERY | dict(modules_to_save=["norm"]),
    "target_parameters": dict(target_modules=[], target_parameters=["q_proj.weight"]),
}
#: What PEFT trains apart, and the names of it.
PARTED = {
    "the embedding": (["embed_tokens"], [EMBED]),
    "the head": (["lm_head"], [HEAD]),
    "each": (["embed_tokens", "lm_head"], [EMBED, HEAD]),
}


def stock():
    return tiny_model("llama", tie_word_embeddings=True)


def with_the_head_as_root():
    return tie(tiny_model("llama", tie_word_embeddings=False), [HEAD, EMBED], init_from=EMBED)


HELD = {
    "in place": lambda: tied_model("in place", "llama"),
    "class form": lambda: tied_model("class form", "llama"),
    "the head as root": with_the_head_as_root,
}


def adapted(model, how="get_peft_model", **options):
    torch.manual_seed(1)
    options = {key: value.copy() if hasattr(value, "copy") else value for key, value in options.items()}
    config = LoraConfig(r=2, **options)  # PEFT writes into what it is given
    if how == "get_peft_model":
        return get_peft_model(model, config)
    model.add_adapter(config)
    return model


def trained(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(steps):
        model(**tiny_inputs(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def outputs(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None]).logits


def run(model, folder):
    arguments = TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, report_to="none",
        save_steps=1,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Sentences(), callbacks=[TyingCallback()]).train()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", HELD.values(), ids=HELD)
@pytest.mark.parametrize("options", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("how", ["get_peft_model", ADD_ADAPTER])
class TestKept:
    def test_it_trains_as_on_a_stock_model(self, make, options, how):
        held, control = (adapted(model, how, **options) for model in (make(), stock()))
        for model in (held, control):
            assert_tied(model)
            assert_tied(trained(model))
        assert torch.equal(outputs(held), outputs(control))
        names = [
            {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
            for model in (held, control)
        ]
        assert names[0] == names[1]

    def test_its_file_is_the_stock_one_and_loads_on_both(self, make, options, how, tmp_path):
        saved = {}
        for side, model in (("stock", stock()), ("held", make())):
            model = trained(adapted(model, how, **options))
            try:
                model.save_pretrained(tmp_path / side)
                saved[side] = load_file(tmp_path / side / "adapter_model.safetensors")
            except RuntimeError:  # transformers cannot write an adapter that stands on both sides of a tie
                assert how == "add_adapter" and {"embed_tokens"} <= {*options["target_modules"]}
        assert len(saved) != 1
        if not saved:
            return
        assert saved["held"].keys() == saved["stock"].keys()
        assert all(torch.equal(value, saved["stock"][name]) for name, value in saved["held"].items())
        if how == "add_adapter":
            return
        expected = outputs(PeftModel.from_pretrained(stock(), tmp_path / "stock").eval())
        loaded = PeftModel.from_pretrained(make(), tmp_path / "stock").eval()
        assert torch.equal(outputs(loaded), expected)
        assert_tied(loaded)


_COPIES = [option for name, option in KEPT.items() if "tokens" in name or "copy" in name]
#: Each model with one kind of copy, and one model with each.
EACH_ONCE = [(make, _COPIES[0]) for make in HELD.values()] + [([*HELD.values()][0], each) for each in _COPIES[1:]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "options"), EACH_ONCE)
def test_the_callback_lets_it_train(make, options, tmp_path):
    run(adapted(make(), **options), tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [form for form in HELD if form != "the head as root"])
@pytest.mark.parametrize("name", ["tokens", "one copy", "one copy, by the head", "a copy of another module"])
def test_a_merge_leaves_one_parameter_and_the_same_outputs(form, name):
    model = trained(adapted(HELD[form](), **KEPT[name]))
    expected = outputs(model)
    merged = model.merge_and_unload()
    assert torch.allclose(outputs(merged), expected, atol=1e-5)
    assert_tied(merged)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [*HELD.values(), stock], ids=[*HELD, "stock"])
@pytest.mark.parametrize("saved,names", PARTED.values(), ids=PARTED)
@pytest.mark.parametrize("how", ["get_peft_model", ADD_ADAPTER])
class TestParted:
    def test_a_copy_that_trains_alone_is_told_before_a_step(self, make, saved, names, how, tmp_path):
        model = adapted(make(), how, **QUERY, modules_to_save=saved)
        before = outputs(model.eval())
        with pytest.raises(TyingError, match="found a copy that PEFT trains alone") as error:
            assert_tied(model)
        told = str(error.value).partition("(modules_to_save) for ")[2].partition(". ")[0]
        assert {*told.split(", ")} == {*names}
        if how == "get_peft_model":
            with pytest.raises(TyingError, match="ensure_weight_tying=True"):
                run(model, tmp_path)
        assert torch.equal(outputs(model.eval()), before)

    def test_it_is_so_that_the_two_sides_go_apart_in_training(self, make, saved, names, how):
        model = trained(adapted(make(), how, **QUERY, modules_to_save=saved))
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert not torch.equal(embedding.weight, head.weight)

    def test_the_ways_out_are_walked(self, make, saved, names, how, tmp_path):
        assert_tied(adapted(make(), how, **QUERY, modules_to_save=saved, ensure_weight_tying=True))
        model = adapted(untie(make(), names), how, **QUERY, modules_to_save=saved)
        assert_tied(model)
        if how == "get_peft_model":
            run(model, tmp_path)


def test_a_copy_that_is_not_at_work_is_not_told(form):
    model = adapted(tied_model(form, "llama"), **QUERY, modules_to_save=["lm_head"])
    with model.disable_adapter():
        assert_tied(model)
    model.add_adapter("plain", LoraConfig(r=2, **QUERY))
    model.set_adapter("plain")
    assert_tied(model)
    model.set_adapter("default")
    with pytest.raises(TyingError, match="modules_to_save"):
        assert_tied(model)


def test_a_copy_of_a_name_that_is_in_no_use_is_not_told(form):
    """BART's `shared` only carries the matrix."""
    assert_tied(adapted(tied_model(form, "bart", "three_way"), **QUERY, modules_to_save=["shared"]))


def test_a_tie_made_by_hand_is_told_under_an_adapter_as_without_one(form):
    model = adapted(tied_model(form, "llama"), **QUERY, trainable_token_indices=[1])
    blocks = model.base_model.model.model.layers
    blocks[1].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight
    with pytest.raises(TyingError, match="are one parameter, but no group declares it"):
        assert_tied(model)
