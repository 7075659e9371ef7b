"""`TyingCallback` compares optimizer and model: a matrix left out, or stepped twice, is told at train begin."""

import warnings

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_tying import TyingCallback, TyingError, tie, untie
from hf_tying.training.callbacks import assert_optimized

from ..tiny import Sentences, tiny_model

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def untied_by_name(model):
    return untie(model, [HEAD])


def tied(model):
    return tie(model, {"embeddings": [HEAD, WTE]}, init_from="output")


def tied_layers(model):
    names = [f"transformer.h.{layer}.mlp.c_fc.weight" for layer in (1, 0)]
    return tie(model, names, init_from=names[0])


def new_head(model):
    model.set_output_embeddings(torch.nn.Linear(16, 64, bias=False))
    return model


#: What is done after the optimizer was made, from which model, and which name it never trains then.
MADE_BEFORE = {
    "untie": (True, untie, HEAD),
    "untie one name": (True, untied_by_name, HEAD),
    "untie as a scheme": (True, lambda model: tie(model, "none"), HEAD),
    "a new head": (False, new_head, HEAD),
}


def run(model, optimizer, folder):
    arguments = TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, report_to="none",
        save_strategy="no",
    )  # fmt: skip
    callbacks = [TyingCallback()]
    Trainer(model, arguments, train_dataset=Sentences(), optimizers=(optimizer, None), callbacks=callbacks).train()


@pytest.mark.parametrize("start_tied,change,name", MADE_BEFORE.values(), ids=MADE_BEFORE)
def test_an_optimizer_made_before_is_refused_and_one_made_after_trains_all(start_tied, change, name, tmp_path):
    model = tiny_model("gpt2", tie_word_embeddings=start_tied)
    before = adamw(model)
    model = change(model)
    values = {key: p.detach().clone() for key, p in model.named_parameters(remove_duplicate=False)}
    with pytest.raises(TyingError, match=f"{name} would never be trained.*Make the optimizer after"):
        run(model, before, tmp_path)
    now = dict(model.named_parameters(remove_duplicate=False))
    assert all(torch.equal(now[key], value) for key, value in values.items())  # before a step
    run(model, adamw(model), tmp_path)
    assert not torch.equal(now[name], values[name])


@pytest.mark.parametrize("change", [tied, tied_layers], ids=["embeddings", "layers"])
def test_a_matrix_that_a_tie_puts_in_its_place_is_no_other_one(change, tmp_path):
    model = tiny_model("gpt2", tie_word_embeddings=False)
    before = adamw(model)
    run(change(model), before, tmp_path)  # the root keeps its parameter: nothing is left out


@pytest.mark.parametrize("held", [True, False], ids=["held", "stock"])
@pytest.mark.parametrize("name", ["wte", "lm_head"])
def test_groups_by_name_that_leave_a_tied_matrix_out_are_refused(held, name, tmp_path):
    model = tiny_model("gpt2")
    model = tie(model, "two_way") if held else model
    rest = [p for key, p in model.named_parameters() if name not in key]
    if name == "lm_head":  # which no name in the list contains: the matrix is with the rest
        return run(model, torch.optim.AdamW(rest), tmp_path)
    with pytest.raises(TyingError, match=f"{WTE}, {HEAD} would never be trained.*requires_grad_") as error:
        run(model, torch.optim.AdamW(rest), tmp_path)
    assert f"leaves out 1 of 28 trained parameters: {WTE}/{HEAD}" in str(error.value)
    model.lm_head.weight.requires_grad_(False)
    run(model, torch.optim.AdamW(rest), tmp_path)


def test_another_parameter_that_is_left_out_is_a_warning(model, told):
    rest = [p for name, p in model.named_parameters() if "ln_" not in name]
    assert_optimized(model, torch.optim.AdamW(rest))
    (message,) = told
    assert "leaves out 10 of 28 trained parameters: transformer.h.0.ln_1.weight, " in message and ", ..." in message


def test_an_optimizer_of_a_part_is_a_warning(model, told):
    assert_optimized(model, torch.optim.AdamW(model.transformer.h[0].parameters()))
    (message,) = told
    assert "leaves out 16 of 28" in message


@pytest.mark.parametrize("make", [
    lambda model: torch.optim.AdamW([torch.nn.Parameter(torch.zeros(9))]),  # as DeepSpeed and FSDP1 flatten them
    adamw,
    lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
], ids=["flattened", "all", "what is trained"])  # fmt: skip
def test_nothing_is_said_without_a_cause(model, told, make):
    model.transformer.wpe.requires_grad_(False)
    assert_optimized(model, make(model))
    assert not told


@pytest.mark.parametrize("config", [
    LoraConfig(r=2, target_modules=["c_attn"]),
    LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices=[1, 2]),
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
], ids=["lora", "tokens", "prompts"])  # fmt: skip
def test_adapters_are_compared_too(model, told, config):
    peft_model = get_peft_model(model, config)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    assert_optimized(peft_model, torch.optim.AdamW(trained))
    assert not [message for message in told if "optimizer" in message]
    frozen = [p for p in peft_model.parameters() if not p.requires_grad]
    assert_optimized(peft_model, torch.optim.AdamW([*trained[1:], *frozen]))
    assert any("leaves out 1 of" in message for message in told)


class TestTwice:
    """One parameter twice in one group, or in two optimizers under one roof: torch steps it twice."""

    @pytest.mark.parametrize("held", [True, False], ids=["held", "stock"])
    def test_a_list_with_each_name_is_refused_and_the_way_out_is_walked(self, held, tmp_path):
        model = tiny_model("gpt2")
        model = tie(model, "two_way") if held else model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twice = torch.optim.AdamW([p for _, p in model.named_parameters(remove_duplicate=False)])
        with pytest.raises(TyingError, match="more than once.*model.named_parameters\\(\\), which lists it once"):
            run(model, twice, tmp_path)
        run(model, torch.optim.AdamW([p for _, p in model.named_parameters()]), tmp_path)

    def test_two_optimizers_under_one_roof(self, model):
        both = torch.optim.AdamW(model.parameters())
        both.param_groups = [*both.param_groups, *torch.optim.SGD([model.lm_head.weight]).param_groups]
        with pytest.raises(TyingError, match="more than once"):
            assert_optimized(model, both)

    def test_two_groups_are_torchs_own_error(self, model):
        with pytest.raises(ValueError, match="more than one parameter group"):
            torch.optim.AdamW([{"params": [model.lm_head.weight]}, {"params": [model.transformer.wte.weight]}])
