"""f10, f20: training, resuming, averaging and choosing parameters by name keep a tie; a change of one side is told."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer, TrainingArguments

from hf_tying import TyingCallback, TyingError, assert_tied, names_of, tie, untie

from ..forms import matrix, tied_model
from ..native_adapters import ADD_ADAPTER
from ..tiny import Sentences, logits, tiny_inputs, tiny_model

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


def step(model, optimizer):
    optimizer.zero_grad()
    model(**tiny_inputs(model)).loss.backward()
    optimizer.step()


def trainer(model, folder, steps=4, logging_steps=1, **kwargs):
    arguments = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=4, save_steps=2, logging_steps=logging_steps,
        use_cpu=True, disable_tqdm=True, report_to="none", **kwargs,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences(),
                   callbacks=[TyingCallback(log_roles=True)])  # fmt: skip


class TestTrainer:
    """f10."""

    def test_resume_is_bit_for_bit(self, form, tmp_path):
        whole = tied_model(form)
        trainer(whole, tmp_path / "whole").train()
        half = tied_model(form)
        trainer(half, tmp_path / "half").train()
        resumed = tied_model(form)
        trainer(resumed, tmp_path / "half").train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
        assert_tied(resumed)
        assert torch.equal(logits(resumed), logits(whole))

    def test_load_best_model_at_end_is_tied_and_says_what_it_says_of_a_stock_model(
        self, model, tmp_path, told_with_transformers
    ):
        for one in (tiny_model("gpt2"), model):
            run = trainer(
                one, tmp_path / type(one).__name__, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2
            )
            run.train()
            assert_tied(run.model)
        missing = [message for message in told_with_transformers if "missing keys" in message]
        assert len(missing) == 2 and missing[0] == missing[1]

    @pytest.mark.parametrize("logging_steps", [1, 2])
    def test_the_callback_logs_the_gradient_by_role(self, model, tmp_path, logging_steps):
        run = trainer(model, tmp_path, logging_steps=logging_steps)
        run.train()
        logs = [entry for entry in run.state.log_history if "loss" in entry]
        assert len(logs) == 4 // logging_steps
        for entry in logs:
            shares = [entry[f"grad_share/embeddings/{role}"] for role in ("target", "output")]
            assert sum(shares) == pytest.approx(1.0) and min(shares) > 0
        model.train()
        assert type(model.lm_head.weight) is torch.nn.Parameter  # the meter has left nothing behind

    def test_the_callback_stops_a_broken_tie_at_train_begin(self, model, tmp_path):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        with pytest.raises(TyingError, match="not tied as declared"):
            trainer(model, tmp_path).train()

    def test_the_callback_stops_a_tie_that_breaks_before_a_save(self, model, tmp_path):
        run = trainer(model, tmp_path)
        control = run.control
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        with pytest.raises(TyingError, match="not tied as declared"):
            TyingCallback().on_save(run.args, run.state, control, model=model)

    def test_an_optimizer_made_before_the_tie_is_refused(self, tmp_path):
        model = tiny_model("gpt2", tie_word_embeddings=False)
        before = torch.optim.AdamW(model.parameters())
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        tie(model, {"embeddings": [HEAD, WTE]}, init_from="output")
        args = trainer(model, tmp_path).args
        run = Trainer(model, args, train_dataset=Sentences(), optimizers=(before, None), callbacks=[TyingCallback])
        with pytest.raises(TyingError, match="Make the optimizer after tie"):
            run.train()


class TestRoleGradients:
    def test_the_gradient_norms_by_role_are_those_of_an_untied_twin(self, form):
        from hf_tying.training.callbacks import measured_roles

        model = tied_model(form, "bart", "three_way")
        twin = untie(copy.deepcopy(model))
        with measured_roles(model) as meter:
            model(**tiny_inputs(model)).loss.backward()
        twin(**tiny_inputs(twin)).loss.backward()
        for role in ("source", "target", "output"):
            expected = matrix(twin, role).grad.norm().item()
            assert meter.norms()[f"grad_norm/embeddings/{role}"] == pytest.approx(expected, rel=1e-5)
        total = sum(matrix(twin, role).grad for role in ("source", "target", "output"))
        assert torch.allclose(matrix(model, "source").grad, total, atol=1e-7)


class TestAverages:
    """f20: exponential moving averages."""

    @pytest.mark.parametrize("kept", ["a model", "a copy of the state dict"])
    @pytest.mark.parametrize("update", [
        lambda ema, live: ema.mul_(0.9).add_(live, alpha=0.1),
        lambda ema, live: ema.copy_(0.9 * ema + 0.1 * live),
        lambda ema, live: ema.lerp_(live, 0.1),
        lambda ema, live: ema.data.mul_(0.9).add_(live, alpha=0.1),
        lambda ema, live: torch.lerp(ema, live, 0.1, out=ema),
        lambda ema, live: ema.__setitem__(slice(None), 0.9 * ema + 0.1 * live),
    ], ids=["mul_ add_", "copy_", "lerp_", "data", "out", "setitem"])  # fmt: skip
    def test_an_average_in_place_over_the_state_dict_is_that_of_a_stock_model(self, model, update, kept):
        averages = []
        for one in (model, tiny_model("gpt2")):
            average = copy.deepcopy(one).state_dict() if kept == "a model" else copy.deepcopy(one.state_dict())
            with torch.no_grad():
                for parameter in one.parameters():
                    parameter.add_(1.0)
                for name, value in one.state_dict().items():
                    update(average[name], value)
            averages.append(average)
        held, stock = averages
        assert held.keys() == stock.keys() and all(torch.equal(held[name], stock[name]) for name in stock)

    def test_an_average_over_the_named_parameters_moves_the_matrix_once(self, model):
        average, start = copy.deepcopy(model), matrix(model, "target").detach().clone()
        with torch.no_grad():
            model.lm_head.weight.add_(1.0)
            live = dict(model.named_parameters())
            for name, value in average.named_parameters():
                value.mul_(0.9).add_(live[name], alpha=0.1)
        assert torch.allclose(matrix(average, "target"), start + 0.1, atol=1e-6)
        assert_tied(average)

    def test_values_copied_into_the_state_dict_reach_the_matrix(self, model):
        backup = {name: value.clone() + 1 for name, value in model.state_dict().items()}
        for name, value in model.state_dict().items():
            value.copy_(backup[name])
        assert torch.equal(model.lm_head.weight, backup[HEAD])

    def test_a_saved_state_dict_holds_plain_tensors_and_the_matrix_once(self, model, tmp_path):
        torch.save(model.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert type(state[HEAD]) is torch.Tensor
        assert state[HEAD].data_ptr() == state[WTE].data_ptr()
        model.load_state_dict(state)

    def test_a_further_name_in_the_state_dict_is_read_as_a_tensor(self, model):
        value = model.state_dict()[HEAD]
        assert torch.equal(value.clone(), model.lm_head.weight) and type(value + 1) is torch.Tensor
        assert value.numpy().shape == (64, 16) and value.data_ptr() == model.lm_head.weight.data_ptr()
        other = tiny_model("gpt2", seed=1)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.lm_head.weight, model.lm_head.weight)

    def test_averaged_model_of_torch_stays_tied(self, model):
        average = AveragedModel(model)
        average.update_parameters(model)
        assert_tied(average)


class TestParameterGroups:
    """f20: parameters chosen by name; `names_of` gives a tied one's other names."""

    @pytest.mark.parametrize("part", ["lm_head", "wte"])
    def test_either_name_finds_the_matrix(self, model, part):
        chosen = [p for p in model.parameters() if any(part in name for name in names_of(model, p))]
        assert len(chosen) == 1 and chosen[0] is model.lm_head.weight
        rest = [p for p in model.parameters() if p is not chosen[0]]
        step(model, torch.optim.AdamW([{"params": chosen, "lr": 0.1}, {"params": rest}], lr=0.0))

    def test_named_parameters_are_those_of_a_stock_model(self, model):
        stock = tiny_model("gpt2")
        assert [*dict(model.named_parameters())] == [*dict(stock.named_parameters())]
        assert {type(name) for name, _ in model.named_parameters()} == {str}

    def test_named_parameters_with_duplicates_lists_every_name(self, model):
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        assert {WTE, HEAD} <= set(names)
        with pytest.raises(ValueError, match="more than one parameter group"):
            torch.optim.AdamW([{"params": [p]} for _, p in model.named_parameters(remove_duplicate=False)])

    def test_an_optimizer_over_names_is_saved_and_loaded(self, model, tmp_path):
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
        step(model, optimizer)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
        assert WTE in loaded["param_groups"][0]["param_names"]
        torch.optim.AdamW(model.named_parameters()).load_state_dict(loaded)


LAYERS = {
    f"{part}{i}": [f"transformer.h.{layer}.{part}.weight" for layer in (0, 1)]
    for i, part in enumerate(["ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"])
}


class TestFrozen:
    """A matrix that is frozen by one name is frozen by all: told where somebody may have meant the one alone."""

    def told(self, model, messages) -> list[str]:
        model.train()
        for _ in range(3):
            model(**tiny_inputs(model))
        return [message for message in messages if "rozen under each of its names" in message]

    def test_freezing_one_role_of_a_model_in_training_is_told_once_and_the_way_out_is_silent(self, model, told):
        model.get_input_embeddings().requires_grad_(False)
        (message,) = self.told(model, told)
        assert f"{WTE}, {HEAD}" in message and f"untie(model, ['{WTE}'])" in message
        told.clear()
        model.requires_grad_(True)
        untie(model, [WTE]).get_input_embeddings().requires_grad_(False)
        assert not self.told(model, told) and model.lm_head.weight.requires_grad

    def test_many_groups_are_one_line(self, form, told):
        model = tied_model(form, spec=LAYERS, init_from="transformer.h.0")
        for part in ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            model.transformer.h[0].get_submodule(part).requires_grad_(False)
        (message,) = self.told(model, told)
        assert "and 3 more groups" in message

    @pytest.mark.parametrize("targets", [["c_attn"], ["wte"], ["lm_head"], "all-linear"])
    @pytest.mark.parametrize("how", ["get_peft_model", ADD_ADAPTER])
    def test_an_adapter_over_a_tied_model_is_no_scare(self, form, told, targets, how):
        for model in (tied_model(form), tied_model(form, spec=LAYERS, init_from="transformer.h.0")):
            config = LoraConfig(r=2, target_modules=targets)
            adapted = get_peft_model(model, config) if how == "get_peft_model" else model
            if how == "add_adapter":
                model.add_adapter(config)
            assert not self.told(adapted, told)

    def test_a_model_of_which_only_the_last_layers_train_is_no_scare(self, model, told):
        model.requires_grad_(False)
        model.transformer.h[-1].requires_grad_(True)
        assert not self.told(model, told)


class TestOneSideIsChanged:
    """f20: pruning, weight norm, quantisation of one side."""

    def test_pruning_the_head_is_told_when_training_and_when_saving(self, model, tmp_path):
        prune.l1_unstructured(model.lm_head, "weight", amount=0.5)
        with pytest.raises(TyingError, match="'lm_head.weight'.*is pruned.*prune.remove"):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        with pytest.raises(TyingError, match="is pruned"):
            model.train()(**tiny_inputs(model))

    @pytest.mark.parametrize("normed", [parametrizations.weight_norm, pytest.param(weight_norm, id="old weight_norm")])
    @pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
    def test_weight_norm_on_the_head_is_told(self, model, normed, tmp_path):
        normed(model.lm_head)
        for act in (lambda: model.train()(**tiny_inputs(model)), model.tie_weights, lambda: assert_tied(model),
                    lambda: model.save_pretrained(tmp_path / "out")):  # fmt: skip
            with pytest.raises(TyingError, match="weight norm"):
                act()
        assert not (tmp_path / "out").exists()

    @pytest.mark.filterwarnings("ignore")
    def test_dynamic_quantisation_of_the_head_is_told(self, model, tmp_path):
        quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
        for act in (
            quantised.tie_weights,
            lambda: assert_tied(quantised),
            lambda: quantised.save_pretrained(tmp_path / "o"),
        ):
            with pytest.raises(TyingError, match="is quantised"):
                act()
        assert not (tmp_path / "o").exists()
        assert_tied(model)

    @pytest.mark.filterwarnings("ignore")
    def test_a_model_untied_first_is_quantised(self, model):
        quantised = torch.ao.quantization.quantize_dynamic(untie(model), {torch.nn.Linear})
        assert_tied(quantised)
        quantised.tie_weights()
        assert torch.allclose(logits(quantised), logits(model), atol=0.05)
