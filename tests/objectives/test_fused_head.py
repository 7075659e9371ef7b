"""`fused_lm_head=True`, the keyword of TRL's trainers, is answered by the model's own forward: its own values."""

import copy
import inspect
import sys
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_tying import TyingError, merge_projection, use_projection, use_tied_loss
from hf_tying.hook import CHANGES, apply_change
from hf_tying.losses import arithmetic, tied_log_probs
from hf_tying.objectives import AugmentedObjective, ContrastiveObjective, fused_head
from hf_tying.objectives.deferred_logits import DeferredLogits
from hf_tying.objectives.fused_head import add_fused_head

from ..losses.helpers import metered
from ..tiny import tiny_inputs, tiny_model, without_dropout

utils = pytest.importorskip("trl.trainer.utils", reason="pip install hf-tying[trl]")
ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def scaled(model_type: str, **changes):
    """A model that does something to its logits."""
    sizes = dict(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


MODELS = {
    "llama": lambda: tiny_model("llama", tie_word_embeddings=True),
    "gpt2": lambda: tiny_model("gpt2"),
    "phi, a bias": lambda: tiny_model("phi"),
    "gemma2, a soft cap": lambda: scaled("gemma2", final_logit_softcapping=0.7),
    "recurrent_gemma, a soft cap of another name": lambda: scaled(
        "recurrent_gemma", logits_soft_cap=0.7, block_types=["attention"], lru_width=16
    ),
    "cohere, a scale": lambda: scaled("cohere", logit_scale=0.3),
    "granite, a divisor": lambda: scaled("granite", logits_scaling=3.0),
}
every_model = pytest.mark.parametrize("name", MODELS)


def projected(model):
    model = use_projection(model)
    with torch.no_grad():
        model.get_output_embeddings().projection.weight.add_(0.1 * torch.randn(16, 16))
    return model


DECLARED = {
    "tied loss": use_tied_loss,
    "projection": projected,
    "both": lambda model: use_tied_loss(projected(model)),
}


def fused(model, stock=False, outputs=ALL, **options):
    add = utils.add_fused_lm_head.__wrapped__ if stock else utils.add_fused_lm_head
    add(model, outputs=outputs, **options)
    return without_dropout(model)


def inputs(model) -> dict:
    found = tiny_inputs(model)
    found["labels"][0, :3] = -100
    return found


def own(model, temperature=1.0) -> dict:
    """By the model's own logits, whole."""
    given = inputs(model)
    labels = given.pop("labels")[:, 1:]
    logits = model(**given).logits[:, :-1].float() / temperature
    log_probs, places = logits.log_softmax(-1), labels.clamp(min=0)
    found = {
        "log_probs": log_probs.gather(-1, places[..., None])[..., 0],
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == places,
    }
    found = {name: torch.where(labels != -100, value, torch.zeros_like(value)) for name, value in found.items()}
    return found | {"loss": -found["log_probs"].sum() / (labels != -100).sum()}


def step(model, outputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (-outputs["log_probs"].mean() - 0.1 * outputs["entropy"].mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, names=(*ALL, "loss"), atol=2e-6):
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=atol)


@every_model
@pytest.mark.parametrize("declared", ["tied loss", "projection"])
def test_values_and_gradients_are_the_models_own(name, declared):
    model = DECLARED[declared](MODELS[name]())
    expected = without_dropout(copy.deepcopy(model))
    model = fused(model, temperature=0.7)
    wanted, found = own(expected, 0.7), model(**inputs(model), fused_lm_head=True)
    penalty = model.loss_parts["projection"] if declared == "projection" else 0.0
    assert_same(found, wanted | {"loss": wanted["loss"] + penalty})
    assert found.label_mask.equal(inputs(model)["labels"][:, 1:] != -100) and found.aux_loss is None
    ours, theirs = step(model, found), step(expected, wanted)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-6)


class TestBesideStock:
    """TRL's own forward, on the same model: right where nothing lies between the hidden states and the matrix."""

    def both(self, made):
        return [fused(made(), stock)(**inputs(made()), fused_lm_head=True) for stock in (False, True)]

    @every_model
    def test_with_a_tied_loss(self, name):
        found, stock = self.both(lambda: use_tied_loss(MODELS[name]()))
        right = own(MODELS[name]())
        assert_same(found, right)
        if name.startswith("recurrent_gemma"):  # TRL reads a soft cap by the name that Gemma 2 gives it
            assert (stock.log_probs - right["log_probs"]).abs().max() > 1e-3
        else:
            assert_same(found, stock)

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_a_projection_is_left_out_by_stock(self, name):
        def made():
            torch.manual_seed(1)
            return projected(MODELS[name]())

        model = made()
        with torch.no_grad():
            right = own(without_dropout(model))
            stock = fused(made(), True)(**inputs(model), fused_lm_head=True)
        assert_same(fused(made())(**inputs(model), fused_lm_head=True), right, ALL)
        assert (stock.log_probs - right["log_probs"]).abs().max() > 1e-2

    def test_a_mixture_has_its_auxiliary_loss(self):
        found, stock = self.both(lambda: use_tied_loss(tiny_model("mixtral", output_router_logits=True)))
        assert_same(found, stock, (*ALL, "loss", "aux_loss"))
        assert found.aux_loss > 0

    @pytest.mark.parametrize("given", ["num_items_in_batch", "shift_labels"])
    def test_a_given_divisor_and_shifted_labels(self, given):
        def made():
            return use_tied_loss(tiny_model("llama"))

        ask = inputs(made())
        if given == "shift_labels":
            ask["shift_labels"] = ask.pop("labels")
        else:
            ask["num_items_in_batch"] = torch.tensor(40)
        found, stock = (fused(made(), stock)(**ask, fused_lm_head=True) for stock in (False, True))
        assert found.log_probs.shape == ((2, 7) if given == "shift_labels" else (2, 6))
        assert_same(found, stock)

    def test_what_is_not_asked_for_is_none(self):
        model = fused(use_tied_loss(tiny_model("llama")), outputs=("is_top1",))
        found = model(**inputs(model), fused_lm_head=True)
        assert found.entropy is None and found.mean_logits is None and found.log_probs is not None

    def test_a_batch_without_labels_can_be_trained_on(self):
        model = fused(use_tied_loss(tiny_model("llama")))
        found = model(**inputs(model) | {"labels": torch.full((2, 7), -100)}, fused_lm_head=True)
        found.loss.backward()
        assert found.loss == 0 and not model.lm_head.weight.grad.any()

    def test_an_untouched_model_has_trls_own_forward(self):
        model = tiny_model("llama")
        utils.add_fused_lm_head(model)
        assert model.forward.__func__.__globals__["__name__"] == "trl.trainer.utils"


class TestTheModel:
    def test_is_otherwise_as_before(self):
        stock, model = tiny_model("gpt2"), fused(use_tied_loss(tiny_model("gpt2")))
        assert inspect.signature(model.forward) == inspect.signature(stock.forward)  # Trainer keeps columns by it
        given = inputs(stock)
        with torch.no_grad():
            assert model.eval()(**given).logits.equal(stock(**given).logits)
            words = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
            assert model.generate(given["input_ids"], **words).equal(stock.generate(given["input_ids"], **words))
        assert model.train()(**given).logits is None

    def test_a_forward_that_was_wrapped_before_stays_wrapped(self):
        model, calls = use_tied_loss(tiny_model("llama")), []
        forward = model.forward
        model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
        expected = own(model.eval())
        model = fused(model)
        calls.clear()
        assert_same(model.eval()(**inputs(model), fused_lm_head=True), expected)
        assert model(**inputs(model)).logits is not None and len(calls) == 2

    def test_the_modes_are_those_of_its_forward(self, monkeypatch):
        """Accelerate wraps a forward in autocast, and the log-probabilities are made after it."""
        model, modes = use_tied_loss(tiny_model("llama")), []
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        compute = tied_log_probs

        def noted(*args, **kwargs):
            modes.append(torch.is_autocast_enabled("cpu"))
            return compute(*args, **kwargs)

        monkeypatch.setattr("hf_tying.objectives.token_log_probs.tied_log_probs", noted)
        model = fused(model)
        model(**inputs(model), fused_lm_head=True).loss.backward()
        assert modes == [True] and not torch.is_autocast_enabled("cpu")

    def test_a_copy_is_its_own(self):
        model = fused(use_tied_loss(tiny_model("llama")))
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight.mul_(2)
        found = other(**inputs(model), fused_lm_head=True)
        assert_same(found, own(other.eval()), ALL)
        found.loss.backward()
        assert model.lm_head.weight.grad is None and other.lm_head.weight.grad is not None

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("by", ["the trainer", "the model", "both, and a second trainer"])
    def test_the_float32_head_that_is_asked_for(self, by, training, monkeypatch):
        monkeypatch.setattr(arithmetic, "has_fast_half", lambda dtype: True)
        head_dtype, cast = None if by == "the trainer" else "float32", by != "the model"
        model = use_tied_loss(tiny_model("llama", dtype=torch.bfloat16), head_dtype=head_dtype)
        for _ in range(2 if "second" in by else 1):
            model = fused(model, cast_lm_head_to_fp32=cast)
        given, seen = inputs(model), []
        model.model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
        compute, deferred = fused_head.token_log_probs, []
        monkeypatch.setattr(
            fused_head, "token_log_probs", lambda logits, *a: deferred.append(type(logits)) or compute(logits, *a)
        )
        outputs = model.train(training)(**given, fused_lm_head=True)
        assert deferred == [DeferredLogits]
        found = outputs.log_probs.detach()
        logits = nn.functional.linear(seen[0].double(), model.lm_head.weight.double())[:, :-1]
        wanted = logits.log_softmax(-1).gather(-1, given["labels"][:, 1:, None].clamp(min=0))[..., 0]
        torch.testing.assert_close(found.double(), wanted * (given["labels"][:, 1:] != -100), rtol=0, atol=1e-5)
        outputs.loss.backward()
        assert model.lm_head.weight.grad.any()
        assert model._tied_loss.head_dtype == (torch.float32 if head_dtype else None)

    @pytest.mark.parametrize("declared", DECLARED)
    @pytest.mark.parametrize("target", ["q_proj", "lm_head"])
    def test_an_adapter_has_its_part(self, declared, target):
        base = DECLARED[declared](tiny_model("llama"))
        utils.add_fused_lm_head(base, outputs=ALL)
        model = without_dropout(get_peft_model(base, LoraConfig(target_modules=[target], init_lora_weights=False)))
        with torch.no_grad():
            assert_same(model(**inputs(base), fused_lm_head=True), own(model), ALL)
        step(model, model(**inputs(base), fused_lm_head=True))
        assert all(p.grad.any() for name, p in model.named_parameters() if "lora_" in name)

    def test_a_hook_on_the_head_sees_its_logits(self):
        model, seen = fused(use_tied_loss(tiny_model("llama"))), []
        model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        assert_same(model(**inputs(model), fused_lm_head=True), own(model.eval()), ALL)
        assert seen[0] == (2, 7, 64)

    def test_a_step_has_one_gradient_of_the_matrix_and_no_logits(self):
        sizes = dict(vocab_size=6000, tie_word_embeddings=True, num_hidden_layers=1)
        peaks = {}
        for stock in (False, True):
            model = fused(use_tied_loss(tiny_model("llama", **sizes), memory_budget=2**16), stock)
            ids = torch.randint(6000, (4, 65))
            _, meter = metered(lambda m=model, i=ids: m(input_ids=i, labels=i, fused_lm_head=True).loss.backward())
            peaks[stock] = meter.as_large_as(6000 * 16 * 4)
        assert peaks[False] == 1 < peaks[True]


class TestRefusals:
    @pytest.mark.parametrize(
        "settings",
        [
            {"objective": AugmentedObjective()},
            {"objective": ContrastiveObjective()},
            {"label_smoothing": 0.1},
        ],
        ids=str,
    )
    def test_a_loss_that_would_be_replaced(self, settings):
        model = use_tied_loss(tiny_model("llama"), **settings)
        what = "label_smoothing=0.1" if "label_smoothing" in settings else "Objective"
        with pytest.raises(TyingError, match=rf"{what}.*by use_tied_loss.*take its place.*use_tied_loss\(model\)"):
            utils.add_fused_lm_head(model)
        assert "forward" not in vars(model)
        utils.add_fused_lm_head(use_tied_loss(model))  # the way out
        assert model.train()(**inputs(model), fused_lm_head=True).loss.isfinite()
        use_tied_loss(model, **settings)
        with pytest.raises(TyingError, match="take its place"):
            model(**inputs(model), fused_lm_head=True)
        with torch.no_grad():  # a metric
            assert model(**inputs(model), fused_lm_head=True).log_probs.isfinite().all()

    def test_another_trl(self):
        def add_fused_lm_head(model, temperature=1.0, outputs=(), tile=8):
            model.taken = True

        add_fused_lm_head.__module__ = utils.__name__
        for made in DECLARED.values():
            model = made(tiny_model("llama"))
            with pytest.raises(TyingError, match=r"TRL \d.*\(cast_lm_head_to_fp32, tile\).*merge_projection"):
                add_fused_head(add_fused_lm_head, (model,), {"tile": 4})
            assert "forward" not in vars(model) and not hasattr(model, "taken")
            use_tied_loss(model, False)
            if "projection" in dir(model.lm_head):
                merge_projection(model)
            add_fused_head(add_fused_lm_head, (model,), {"tile": 4})  # the ways out
            assert model.taken

    def test_an_output_that_is_not_known(self):
        with pytest.raises(TyingError, match=r"\(rank\)"):
            utils.add_fused_lm_head(use_tied_loss(tiny_model("llama")), outputs=("log_probs", "rank"))


def test_modules_that_have_imported_the_name_before_get_ours_too(monkeypatch):
    change = next(change for change in CHANGES if change.copied)
    package, home, trainer, lazy = (ModuleType(n) for n in ("pack", "pack.utils", "pack.trainer", "pack.lazy"))
    home.function = trainer.function = lambda model: "stock"
    lazy.function = lambda model: "another of this name"
    for module in (package, home, trainer, lazy):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    changed = type(change)("pack.utils", "function", f"{__name__}:wrapper", change.why, copied=True)
    apply_change(changed, home)
    assert home.function(None) == trainer.function(None) == "ours" and lazy.function(None) != "ours"


def wrapper(wrapped, instance, args, kwargs):
    return "ours"
