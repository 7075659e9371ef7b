"""Ties that change in mid-run: untying, freezing a role, scaling the input role; each against plain torch."""

import copy

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_tying import TyingCallback, TyingError, assert_tied, tie, untie, use_tied_loss
from hf_tying.ties.anatomy import roles
from hf_tying.ties.slots import find_parameter
from hf_tying.training.roles import measured_roles, scale_input_gradient
from hf_tying.training.schedules import freeze_role, step_of, untie_trained

from ..forms import matrix, tied_model
from ..tiny import Sentences, tiny_inputs, tiny_model, untied_twin

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
#: Of Adam where a run is compared with a plain loop: by its own 1e-8 the least rounding of a gradient near zero
#: becomes a whole step.
EPSILON = 1e-3
NO_DROPOUT = {"gpt2": dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), "bart": dict(dropout=0.0)}


class OneSentence(torch.utils.data.Dataset):
    """Sixteen times the same: the order of the batches does not matter."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.randint(3, 60, (6,), generator=torch.Generator().manual_seed(3))
        # The first word is predicted from nothing, and Trainer counts labels before it has been left out.
        return {"input_ids": ids, "labels": ids.clone().index_fill_(0, torch.tensor([0]), -100)}


class Watch(TrainerCallback):
    """After each step, whether the two matrices are one, and whether they are equal."""

    def __init__(self):
        self.one, self.equal, self.held = [], [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        wte, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        self.one.append(wte is head)
        self.equal.append(torch.equal(wte, head))
        self.held.append((wte.detach().clone(), head.detach().clone()))


def trainer(model, folder, callback, *more, steps=6, data=None, **kwargs):
    arguments = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
        report_to="none", **{"save_steps": 2, "logging_steps": 1, "learning_rate": 0.01, **kwargs},
    )  # fmt: skip
    data = data or Sentences()
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=[callback, *more])


def plain_steps(model, optimizer, scheduler, steps, batch, clip=1.0):
    """What Trainer does with one sentence, in plain torch."""
    model.train()
    for _ in range(steps):
        model(**batch).loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        scheduler.step()
        model.zero_grad()


def values(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


def unlike(model, twin, atol=1e-6) -> list[str]:
    """The names that differ by more than rounding."""
    expected = values(twin)
    return [name for name, value in values(model).items() if not torch.allclose(value, expected[name], atol=atol)]


def the_batch() -> dict[str, torch.Tensor]:
    return {key: value.expand(4, -1) for key, value in OneSentence()[0].items()}


def decayed(model) -> list[dict]:
    """Two parameter groups, as Trainer makes them."""
    apart = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            apart[parameter.ndim > 1].append((name, parameter))
    return [{"params": apart[True], "weight_decay": 0.1}, {"params": apart[False], "weight_decay": 0.0, "lr": 0.02}]


OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
}


class TestUntyingAnOptimizer:
    """`untie_trained`: every next step is that of a model untied all along, with that state."""

    @pytest.mark.parametrize("arch", ["gpt2", "bart"])
    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_all_later_steps_are_those_of_an_untied_model_with_the_same_state(self, make, arch):
        model = tied_model("in place", arch, "two_way" if arch == "gpt2" else "three_way", **NO_DROPOUT[arch])
        batch = tiny_inputs(model)
        optimizer = make(decayed(model))
        scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
        plain_steps(model, optimizer, scheduler, 3, batch)
        # The twin: other code for GPT-2, for BART the package's own untie, and a new optimizer for both.
        if arch == "gpt2":
            twin = untied_twin(model, _untied_gpt2())
        else:
            twin = untie(copy.deepcopy(model))
        other = make(decayed(twin))
        other_scheduler = LambdaLR(other, lambda step: 0.9**step)
        own = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in twin.named_parameters():
            other.state[parameter] = copy.deepcopy(optimizer.state[own[name]])
        other_scheduler.load_state_dict(scheduler.state_dict())
        for mine, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
            theirs.update({key: value for key, value in mine.items() if key not in ("params", "param_names")})

        untie_trained(model, optimizer)
        assert_tied(model)
        assert model.config.tying["scheme"] == "none"
        plain_steps(model, optimizer, scheduler, 3, batch)
        plain_steps(twin, other, other_scheduler, 3, batch)
        found, expected = values(model), values(twin)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert not torch.equal(matrix(model, "target"), matrix(model, "output"))  # they have gone apart

    def test_the_state_dict_lines_up_with_an_optimizer_made_for_the_untied_model(self, model):
        optimizer = torch.optim.AdamW(decayed(model))
        plain_steps(model, optimizer, LambdaLR(optimizer, lambda step: 1.0), 1, tiny_inputs(model))
        untie_trained(model, optimizer)
        new = torch.optim.AdamW(decayed(model))
        for mine, theirs in zip(optimizer.param_groups, new.param_groups, strict=True):
            assert [id(p) for p in mine["params"]] == [id(p) for p in theirs["params"]]
            assert [str(name) for name in mine["param_names"]] == [str(name) for name in theirs["param_names"]]

    def test_the_first_name_keeps_the_parameter_and_the_copy_shares_no_state(self, model):
        optimizer = torch.optim.AdamW(model.parameters())
        plain_steps(model, optimizer, LambdaLR(optimizer, lambda step: 1.0), 1, tiny_inputs(model))
        old = model.lm_head.weight
        untie_trained(model, optimizer)
        assert model.transformer.wte.weight is old
        first, second = (optimizer.state[matrix(model, role)] for role in ("target", "output"))
        assert first.keys() == second.keys() and torch.equal(first["exp_avg"], second["exp_avg"])
        assert all(first[key] is not second[key] for key in first)

    def test_an_optimizer_without_the_matrix_is_refused_and_nothing_is_changed(self, model):
        optimizer = torch.optim.AdamW(model.transformer.h.parameters())
        with pytest.raises(TyingError, match="AdamW does not hold its matrix"):
            untie_trained(model, optimizer)
        assert model.lm_head.weight is model.transformer.wte.weight


def _untied_gpt2():
    return tiny_model("gpt2", tie_word_embeddings=False, **NO_DROPOUT["gpt2"])


class TestUntieAt:
    @pytest.mark.parametrize("tied_loss", [False, True])
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_a_run_is_the_plain_loop_that_splits_the_matrix(self, tmp_path, accumulation, tied_loss):
        model = tied_model("in place", **NO_DROPOUT["gpt2"])
        twin = untied_twin(model, _untied_gpt2())
        if tied_loss:
            use_tied_loss(model)
        twin.lm_head.weight = twin.transformer.wte.weight
        options = dict(weight_decay=0.1, gradient_accumulation_steps=accumulation, adam_epsilon=EPSILON)
        watch = Watch()
        run = trainer(model, tmp_path, TyingCallback(untie_at=0.5), watch, data=OneSentence(), save_strategy="no",
                      lr_scheduler_type="linear", **options)  # fmt: skip
        run.train()
        assert watch.one == [True] * 3 + [False] * 3

        def optimize(groups):
            return torch.optim.AdamW(groups, lr=0.01, eps=EPSILON)

        def decay(step):
            return 1 - step / 6

        optimizer = optimize(_by_dimension(twin))
        plain_steps(twin, optimizer, LambdaLR(optimizer, decay), 3, the_batch())
        moments = optimizer.state[twin.lm_head.weight]
        twin.lm_head.weight = torch.nn.Parameter(twin.lm_head.weight.detach().clone())
        states = {id(p): state for p, state in optimizer.state.items()}
        untied = optimize(_by_dimension(twin))
        for group in untied.param_groups:
            for parameter in group["params"]:
                untied.state[parameter] = copy.deepcopy(states.get(id(parameter), moments))
        plain_steps(twin, untied, LambdaLR(untied, lambda step: decay(step + 3)), 3, the_batch())
        assert unlike(model, twin) == []
        assert model.config.tying["scheme"] == "none" and model.config.tie_word_embeddings is False

    @pytest.mark.parametrize("untie_at, step", [(0.5, 3), (4, 4), (1, 1), (1.0, 6), (1 / 3, 2), (0.001, 1)])
    def test_the_moment_is_a_fraction_or_a_number_of_steps(self, untie_at, step):
        assert step_of(untie_at, 6) == step

    @pytest.mark.parametrize("checkpoint", [2, 4])
    def test_resume_is_bit_for_bit_from_the_moment_itself_and_after_it(self, tmp_path, checkpoint):
        whole = tied_model("in place")
        trainer(whole, tmp_path, TyingCallback(untie_at=2)).train()
        folder = tmp_path / f"checkpoint-{checkpoint}"
        resumed = AutoModelForCausalLM.from_pretrained(folder)
        assert (resumed.lm_head.weight is resumed.transformer.wte.weight) == (checkpoint == 2)
        trainer(resumed, tmp_path / "b", TyingCallback(untie_at=2)).train(resume_from_checkpoint=str(folder))
        expected = values(whole)
        assert all(torch.equal(value, expected[name]) for name, value in values(resumed).items())
        assert not torch.equal(expected[WTE], expected[HEAD])

    def test_resume_with_any_untied_model_is_bit_for_bit_too(self, tmp_path):
        whole = tied_model("in place")
        trainer(whole, tmp_path, TyingCallback(untie_at=2)).train()
        resumed = untie(tied_model("in place"))
        run = trainer(resumed, tmp_path / "b", TyingCallback(untie_at=2))
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert all(torch.equal(value, values(whole)[name]) for name, value in values(resumed).items())

    @pytest.mark.parametrize("make", [
        lambda: tied_model("in place"), lambda: tied_model("class form"), lambda: tiny_model("gpt2")
    ], ids=["in place", "class form", "stock"])  # fmt: skip
    def test_resume_after_the_moment_with_a_tied_model_is_refused(self, tmp_path, make):
        trainer(make(), tmp_path, TyingCallback(untie_at=2)).train()
        run = trainer(make(), tmp_path / "b", TyingCallback(untie_at=2))
        with pytest.raises(TyingError, match=r"untie\(model\) first to keep both"):
            run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))

    def test_a_tied_model_whose_values_fitted_is_refused_at_train_begin(self, model, tmp_path):
        run = trainer(model, tmp_path, TyingCallback(untie_at=2))
        run.state.global_step, run.state.max_steps = 4, 6
        with pytest.raises(TyingError, match="Resumed at step 4, after the untying at step 2.*from_pretrained"):
            TyingCallback(untie_at=2).on_train_begin(run.args, run.state, run.control, model=model)

    def test_a_best_checkpoint_from_the_tied_time_is_loaded_into_both_matrices(self, tmp_path):
        model, watch = tiny_model("gpt2"), Watch()  # the stock class ties it, and would write the matrix once
        run = trainer(model, tmp_path, TyingCallback(untie_at=2), watch, load_best_model_at_end=True, eval_steps=2,
                      eval_strategy="steps", metric_for_best_model="eval_loss", greater_is_better=True)  # fmt: skip
        run.train()
        assert run.state.best_model_checkpoint.endswith("checkpoint-2")
        assert torch.equal(model.lm_head.weight, watch.held[1][0])
        assert torch.equal(model.transformer.wte.weight, watch.held[1][0])
        assert model.lm_head.weight is not model.transformer.wte.weight

    def test_the_role_meter_measures_until_then_and_leaves_nothing_behind(self, model, tmp_path):
        run = trainer(model, tmp_path, TyingCallback(log_roles=True, untie_at=2), steps=4)
        run.train()
        measured = ["grad_share/embeddings/output" in log for log in run.state.log_history if "loss" in log]
        assert measured == [True, True, False, False]
        assert all(type(matrix(model, role)) is torch.nn.Parameter for role in ("target", "output"))

    def test_at_the_last_step_it_stays_tied_and_that_is_said(self, model, tmp_path, told_with_transformers):
        trainer(model, tmp_path, TyingCallback(untie_at=1.0), steps=2).train()
        assert model.lm_head.weight is model.transformer.wte.weight
        assert [m for m in told_with_transformers if "not before the last of 2 steps: never untied" in m]

    def test_with_nothing_tied_it_is_refused(self, tmp_path):
        run = trainer(_untied_gpt2(), tmp_path, TyingCallback(untie_at=2))
        with pytest.raises(TyingError, match="nothing is tied"):
            run.train()

    @pytest.mark.parametrize("options", [dict(untie_at=0.5), dict(freeze="output")])
    def test_several_processes_are_refused(self, model, tmp_path, monkeypatch, options):
        run = trainer(model, tmp_path, TyingCallback())
        monkeypatch.setattr(TrainingArguments, "world_size", 2)
        run.state.max_steps = 6
        with pytest.raises(TyingError, match="need one process, found 2"):
            TyingCallback(**options).on_train_begin(run.args, run.state, run.control, model=model)


def _by_dimension(model) -> list[dict]:
    """As Trainer has it for GPT-2: weight decay on matrices alone."""
    parts = [[p for n, p in model.named_parameters() if ("ln_" in n or "bias" in n) == flat] for flat in (False, True)]
    return [{"params": parts[0], "weight_decay": 0.1}, {"params": parts[1], "weight_decay": 0.0}]


class TestFreeze:
    @pytest.mark.parametrize("role, frozen, free", [("output", HEAD, WTE), ("input", WTE, HEAD)])
    def test_a_run_is_the_plain_loop_over_the_other_matrix(
        self, tmp_path, role, frozen, free, told_with_transformers
    ):  # fmt: skip
        model = tied_model("in place", **NO_DROPOUT["gpt2"])
        twin = untied_twin(model, _untied_gpt2())
        run = trainer(model, tmp_path, TyingCallback(freeze=role), data=OneSentence(), weight_decay=0.1,
                      lr_scheduler_type="constant", adam_epsilon=EPSILON)  # fmt: skip
        run.train()
        twin.get_parameter(frozen).requires_grad_(False)
        optimizer = torch.optim.AdamW(_by_dimension(twin), lr=0.01, eps=EPSILON)
        plain_steps(twin, optimizer, LambdaLR(optimizer, lambda step: 1.0), 6, the_batch())
        assert unlike(model, twin) == []
        found, expected = values(model), values(twin)
        assert torch.equal(found[frozen], expected[frozen]) and not torch.equal(found[free], found[frozen])
        told = [m for m in told_with_transformers if f"freeze={role!r}" in m]
        assert len(told) == 1 and f"{64 * 16:,} parameters more" in told[0]
        assert model.config.tying["scheme"] == "none"
        assert all(p.requires_grad for p in model.parameters())  # freed at the end

    def test_until_a_moment_it_stands_still_and_then_moves(self, model, tmp_path):
        watch, start = Watch(), matrix(model, "output").detach().clone()
        trainer(model, tmp_path, TyingCallback(freeze="output", freeze_until=0.5), watch).train()
        assert [torch.equal(head, start) for _, head in watch.held] == [True] * 3 + [False] * 3

    def test_resume_is_bit_for_bit(self, tmp_path):
        whole = tied_model("in place")
        trainer(whole, tmp_path, TyingCallback(freeze="output", freeze_until=5)).train()
        resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
        run = trainer(resumed, tmp_path / "b", TyingCallback(freeze="output", freeze_until=5))
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert all(torch.equal(value, values(whole)[name]) for name, value in values(resumed).items())

    @pytest.mark.parametrize("role, still_one", [
        ("source", [("source", "carrier"), ("target", "output")]), ("target", [("source", "output", "carrier")]),
        ("output", [("source", "target", "carrier")]), ("input", [("source", "target", "carrier")]),
    ])  # fmt: skip
    def test_of_three_roles_what_is_not_parted_stays_one(self, form, role, still_one):
        model = tied_model(form, "bart", "three_way")
        optimizer = torch.optim.AdamW(model.parameters())
        changed = freeze_role(model, optimizer, role)
        assert_tied(model)
        held = roles(model)
        matrices = {part: find_parameter(model, found.name) for part, found in held.items()}
        matrices["carrier"] = find_parameter(model, held["source"].names[0])
        expected = {frozenset(parts) for parts in still_one}
        found: dict[int, set] = {}
        for part, parameter in matrices.items():
            found.setdefault(id(parameter), set()).add(part)
        assert {frozenset(parts) for parts in found.values() if len(parts) > 1} == expected
        frozen = {"input": ["source", "target"]}.get(role, [role])
        assert all(not matrices[part].requires_grad for part in frozen)
        assert all(matrices[part].requires_grad for part in ("source", "target", "output") if part not in frozen)
        assert {id(p) for p in changed} == {id(matrices[part]) for part in frozen}
        stepped = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert stepped == [id(p) for p in model.parameters()]  # each once, in order, the frozen ones too

    def test_a_root_of_the_users_own_choice_leaves_no_stale_matrix_in_the_optimizer(self):
        model = tiny_model("bart", tie_word_embeddings=False)
        names = [name for part in roles(model).values() for name in part.names]
        tie(model, {"e": [names[1], names[0], *names[2:]]}, init_from="source")
        optimizer = torch.optim.AdamW(model.parameters())
        freeze_role(model, optimizer, "source")
        stepped = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert stepped == [id(p) for p in model.parameters()]

    def test_a_group_that_is_frozen_whole_stays_tied(self):
        model = tied_model("in place", "bart", "source_target", tie_word_embeddings=False)
        freeze_role(model, None, "input")
        assert matrix(model, "source") is matrix(model, "target") and not matrix(model, "source").requires_grad
        assert model.config.tying["scheme"] == "source_target"

    def test_an_untied_model_is_only_frozen(self, told_with_transformers):
        model = _untied_gpt2()
        assert freeze_role(model, None, "output") == [model.lm_head.weight]
        assert not [m for m in told_with_transformers if "freeze=" in m]

    def test_a_role_that_the_model_has_not_is_named(self, model, tmp_path):
        with pytest.raises(TyingError, match="no source embedding: its roles are target, output"):
            trainer(model, tmp_path, TyingCallback(freeze="source")).train()
        assert model.lm_head.weight is model.transformer.wte.weight


class TestInputGradientScale:
    @pytest.mark.parametrize("scale", [5, 0.5, 0])
    @pytest.mark.parametrize("tied_loss", [False, True])
    @pytest.mark.parametrize("arch, scheme", [("gpt2", "two_way"), ("bart", "three_way")])
    def test_the_gradient_is_that_of_an_untied_twin_with_the_scaled_part(self, arch, scheme, tied_loss, scale):
        model = tied_model("in place", arch, scheme, dtype=torch.float64)
        twin = untie(copy.deepcopy(model))
        if tied_loss:
            use_tied_loss(model)
        model.train(), twin.train()
        torch.manual_seed(1)
        twin(**tiny_inputs(twin)).loss.backward()
        scale_input_gradient(model, scale)
        torch.manual_seed(1)
        outputs = model(**tiny_inputs(model))
        outputs.loss.backward()
        assert (outputs.logits is None) == tied_loss
        inputs = [matrix(twin, role).grad for role in ("source", "target") if role in roles(twin)]
        expected = scale * sum(inputs) + matrix(twin, "output").grad
        exact = 1e-7 if arch == "gpt2" else 1e-12  # its stock loss is computed in float32, by blocks it is not
        assert torch.allclose(matrix(model, "output").grad, expected, atol=exact)
        own = {id(matrix(model, role)) for role in roles(model)}
        others = dict(twin.named_parameters(remove_duplicate=False))
        for name, parameter in model.named_parameters():
            if id(parameter) not in own:
                assert torch.allclose(parameter.grad, others[name].grad, atol=exact), name

    def test_a_scaled_embedding_is_scaled_once(self):
        model = tied_model("in place", "gemma3_text", dtype=torch.float64)
        twin = untie(copy.deepcopy(model))
        twin(**tiny_inputs(twin)).loss.backward()
        scale_input_gradient(model, 5)
        model(**tiny_inputs(model)).loss.backward()
        expected = 5 * matrix(twin, "target").grad + matrix(twin, "output").grad
        assert torch.allclose(matrix(model, "output").grad, expected, atol=1e-12)

    def test_the_role_meter_sees_the_gradient_as_it_is_applied(self, model):
        shares = []
        for scale in (1, 5):
            handles = scale_input_gradient(model, scale)
            with measured_roles(model) as meter:
                model(**tiny_inputs(model)).loss.backward()
            shares.append(meter.norms())
            [handle.remove() for handle in handles]
        name = "grad_norm/embeddings/{}".format
        assert shares[1][name("target")] == pytest.approx(5 * shares[0][name("target")], rel=1e-5)
        assert shares[1][name("output")] == pytest.approx(shares[0][name("output")], rel=1e-6)

    @pytest.mark.parametrize("tied_loss", [False, True])
    def test_a_step_of_trainer_uses_it_and_it_is_gone_afterwards(self, tmp_path, tied_loss):
        start = tied_model("in place", **NO_DROPOUT["gpt2"])
        before = values(start)
        batch = the_batch()

        def gradient(model):
            model.zero_grad()
            model.train()(**batch).loss.backward()
            return matrix(model, "output").grad.clone()

        plain = gradient(start)
        twin = untie(copy.deepcopy(start))
        gradient(twin)
        expected = 5 * matrix(twin, "target").grad + matrix(twin, "output").grad
        start.zero_grad()
        if tied_loss:
            use_tied_loss(start)
        trainer(start, tmp_path, TyingCallback(input_gradient_scale=5.0), steps=1, data=OneSentence(), optim="sgd",
                max_grad_norm=0.0, save_strategy="no", lr_scheduler_type="constant").train()  # fmt: skip
        assert torch.allclose(before[WTE] - matrix(start, "target"), 0.01 * expected, atol=1e-6)
        with torch.no_grad():
            for name, parameter in start.named_parameters():
                parameter.copy_(before[str(name)])
        assert torch.allclose(gradient(start), plain, atol=1e-6)

    def test_evaluation_and_a_frozen_matrix_pass_through(self, model):
        scale_input_gradient(model, 5)
        with torch.no_grad():
            model(**tiny_inputs(model))
        model.transformer.wte.weight.requires_grad_(False)
        model(**tiny_inputs(model)).loss.backward()
        assert model.transformer.h[0].mlp.c_fc.weight.grad is not None


class TestWrongValues:
    @pytest.mark.parametrize("options, message", [
        (dict(untie_at=0), "untie_at=0: expected a fraction"), (dict(untie_at=0.0), "untie_at=0.0"),
        (dict(untie_at=1.5), "untie_at=1.5"), (dict(untie_at=True), "untie_at=True"),
        (dict(untie_at=float("nan")), "untie_at=nan"), (dict(untie_at="half"), "untie_at='half'"),
        (dict(freeze="softmax"), "freeze='softmax'.*input, source, target, output"),
        (dict(freeze_until=0.5), "without freeze"), (dict(freeze="output", freeze_until=-1), "freeze_until=-1"),
        (dict(input_gradient_scale=-1), "input_gradient_scale=-1"),
        (dict(input_gradient_scale=float("nan")), "input_gradient_scale=nan"),
        (dict(input_gradient_scale=True), "input_gradient_scale=True"), (dict(diagnose_steps=5), "untied twin"),
    ])  # fmt: skip
    def test_it_is_told_when_the_callback_is_made(self, options, message):
        with pytest.raises(TyingError, match=message):
            TyingCallback(**options)

    def test_a_callback_runs_a_second_training_like_the_first(self, tmp_path):
        callback = TyingCallback(freeze="output", input_gradient_scale=2.0, log_roles=True)
        model = tied_model("in place")
        for part in ("a", "b"):
            start = matrix(model, "output").detach().clone()
            trainer(model, tmp_path / part, callback, steps=2).train()
            assert torch.equal(matrix(model, "output"), start)
        assert not model.transformer.wte._forward_hooks

    def test_tying_again_after_an_untying_run_works(self, model, tmp_path):
        trainer(model, tmp_path, TyingCallback(untie_at=1), steps=2).train()
        tie(model, "two_way", init_from="output")
        trainer(model, tmp_path / "b", TyingCallback(untie_at=1), steps=2).train()
        assert model.config.tying["scheme"] == "none"
