"""`use_tied_loss(model, head_dtype="float32")`: the head of a half-precision model in float32, from the one matrix."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from hf_tying import TyingError, use_projection, use_tied_loss
from hf_tying.losses import arithmetic, tied_cross_entropy, tied_distillation, tied_log_probs
from hf_tying.losses.wide_linear import wide_linear
from hf_tying.objectives import AugmentedObjective

from ..losses.helpers import error, leaf, metered
from ..tiny import tiny_inputs, tiny_model, without_dropout
from .helpers import model_with

ARCHITECTURES = ["llama", "gpt2", "phi", "gemma3_text", "bart"]
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


@pytest.fixture(autouse=True)
def fast_half(monkeypatch):
    """As on a CPU that multiplies bfloat16 fast: there the products are in it, unless float32 is asked for."""
    monkeypatch.setattr(arithmetic, "has_fast_half", lambda dtype: True)


def made(arch="llama", head_dtype="float32", **changes):
    model = tiny_model(arch, dtype=torch.bfloat16, **changes)
    return without_dropout(use_tied_loss(model, head_dtype=head_dtype))


def head_input(model, **given):
    """What the head gets, and what the forward pass gives."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs = model(**given)
    handle.remove()
    return seen[0], outputs


def exact_logits(model, hidden):
    head = model.get_output_embeddings()
    logits = F.linear(hidden.double(), head.weight.double(), None if head.bias is None else head.bias.double())
    return logits + model.final_logits_bias.double() if hasattr(model, "final_logits_bias") else logits


@every_architecture
def test_logits_in_evaluation_are_in_float32(arch):
    model = made(arch).eval()
    with torch.no_grad():
        hidden, outputs = head_input(model, **tiny_inputs(model))
        exact = exact_logits(model, hidden)
        assert hidden.dtype == torch.bfloat16 and outputs.logits.dtype == torch.float32
        assert error(outputs.logits, exact) < 1e-6
        _, narrow = head_input(use_tied_loss(model), **tiny_inputs(model))
    assert narrow.logits.dtype == torch.bfloat16 and error(narrow.logits, exact) > 1e-4


@every_architecture
def test_a_training_step_has_their_loss_and_gradients(arch):
    model, ids = made(arch), tiny_inputs(tiny_model(arch))
    labels = ids["labels"]
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs = model(**ids)
    assert outputs.logits is None
    head = model.get_output_embeddings()
    hidden, weight = leaf(seen[0].double()), leaf(head.weight.double())
    logits = F.linear(hidden, weight, None if head.bias is None else head.bias.detach().double())
    if arch == "bart":
        wanted = F.cross_entropy(logits.view(-1, 64), labels.view(-1))
    else:
        wanted = F.cross_entropy(logits[:, :-1].reshape(-1, 64), labels[:, 1:].reshape(-1))
    assert float(outputs.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    found = torch.autograd.grad(outputs.loss, seen[0], retain_graph=False)[0]
    assert error(found, torch.autograd.grad(wanted, hidden)[0]) < 4e-3  # rounded once, to bfloat16


def test_the_matrix_is_rounded_once_where_its_gradient_is_summed():
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 16).bfloat16(), torch.randn(64, 16).bfloat16()
    labels = torch.randint(64, (300,))
    exact = leaf(weight.double())
    F.cross_entropy(hidden.double() @ exact.T, labels).backward()
    for loss in (
        lambda w: tied_cross_entropy(hidden, w, labels, head_dtype=torch.float32),
        lambda w: -tied_log_probs(hidden, w, labels, head_dtype=torch.float32).log_probs.mean(),
        lambda w: F.cross_entropy(wide_linear(hidden, w, None, torch.float32), labels),
    ):
        trained = leaf(weight)
        loss(trained).backward()
        assert trained.grad.dtype == torch.bfloat16 and trained.grad.equal(trained.grad.to(torch.bfloat16))
        assert error(trained.grad, exact.grad) < 2e-3


class TestMemory:
    SIZES = dict(vocab_size=40_000, hidden_size=256, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1)
    BYTES = 40_000 * 256

    def test_a_step_makes_no_float32_matrix(self):
        model = made(tie_word_embeddings=True, **self.SIZES)
        ids = torch.randint(40_000, (1, 17))
        _, meter = metered(lambda: model(input_ids=ids, labels=ids).loss.backward())
        assert meter.as_large_as(self.BYTES * 4) == 0 and meter.as_large_as(self.BYTES * 2) == 1

    def test_logits_make_none(self):
        model = made(**self.SIZES).eval()
        with torch.no_grad():
            _, meter = metered(lambda: model(input_ids=torch.arange(9)[None]))
        assert meter.as_large_as(self.BYTES * 2) == 0
        hidden = torch.randn(5, 256).bfloat16()
        _, meter = metered(lambda: wide_linear(hidden, model.lm_head.weight, None, torch.float32).sum().backward())
        assert meter.as_large_as(self.BYTES * 4) == 0 and meter.as_large_as(self.BYTES * 2) == 1


class TestTheRest:
    def test_generation_takes_the_largest_of_these_logits(self):
        model, ids = made().eval(), torch.randint(3, 60, (1, 5))
        found = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, output_logits=True,
                               return_dict_in_generate=True)  # fmt: skip
        assert all(logits.dtype == torch.float32 for logits in found.logits)
        with torch.no_grad():
            assert found.sequences[0, -1] == model(found.sequences[:, :-1]).logits[0, -1].argmax()

    def test_whole_logits_of_a_step_are_the_same(self):
        model, seen = made(), []
        model.lm_head.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        model(**tiny_inputs(model)).loss.backward()
        hidden, logits = seen[0]
        assert logits.dtype == torch.float32 and error(logits.detach(), exact_logits(model, hidden).detach()) < 1e-6
        assert model.lm_head.weight.grad.any()

    def test_a_step_without_labels(self):
        model = made()
        logits = model(input_ids=tiny_inputs(model)["input_ids"]).logits
        assert logits.dtype == torch.float32
        logits.logsumexp(-1).mean().backward()
        assert model.lm_head.weight.grad.any() and model.model.norm.weight.grad.any()

    @pytest.mark.parametrize("training", [True, False])
    def test_under_autocast(self, training):
        model = use_tied_loss(tiny_model("llama"), head_dtype="float32").train(training)
        given = tiny_inputs(model)
        with torch.autocast("cpu", torch.bfloat16):
            hidden, outputs = head_input(model, **given)
        logits = exact_logits(model, hidden)[:, :-1].reshape(-1, 64)
        wanted = F.cross_entropy(logits, given["labels"][:, 1:].reshape(-1))
        assert float(outputs.loss) == pytest.approx(float(wanted), rel=1e-6)

    @pytest.mark.parametrize("transformed", [True, False])
    def test_losses_under_autocast(self, transformed):
        torch.manual_seed(0)
        hidden, weight, labels = torch.randn(20, 16), torch.randn(64, 16), torch.randint(64, (20,))
        exact = (hidden.double() @ weight.double().T).log_softmax(-1)
        teacher = torch.randn(20, 8), torch.randn(64, 8)
        log_p = (teacher[0].double() @ teacher[1].double().T).log_softmax(-1)
        losses = {
            lambda x, **wide: tied_log_probs(x, weight, labels, **wide).log_probs.mean(): -F.nll_loss(exact, labels),
            lambda x, **wide: tied_cross_entropy(x, weight, labels, **wide): F.nll_loss(exact, labels),
            lambda x, **wide: tied_distillation(x, weight, *teacher, **wide): (log_p.exp() * (log_p - exact)).sum(1),
        }
        for loss, wanted in losses.items():
            with torch.autocast("cpu", torch.bfloat16):
                wide, narrow = (
                    torch.func.vmap(lambda x: loss(x, **head))(hidden[None]) if transformed else loss(hidden, **head)  # noqa: B023
                    for head in ({"head_dtype": torch.float32}, {})
                )
            assert error(wide.reshape(()), wanted.mean()) < 1e-6
            assert transformed or error(narrow, wanted.mean()) > 1e-5

    def test_a_projection_and_an_adapter_on_the_head(self):
        base = use_tied_loss(use_projection(tiny_model("llama", dtype=torch.bfloat16)), head_dtype="float32")
        hidden, outputs = head_input(base.eval(), **tiny_inputs(base))
        with torch.no_grad():
            exact = exact_logits(base, base.lm_head.projection(hidden))
        assert error(outputs.logits.detach(), exact) < 1e-6
        model = get_peft_model(made(), LoraConfig(target_modules=["lm_head"])).eval()
        assert model(**tiny_inputs(made())).logits.dtype == torch.float32

    def test_it_can_be_undone(self):
        model = use_tied_loss(made(), False).eval()
        assert model(**tiny_inputs(model)).logits.dtype == torch.bfloat16

    def test_another_head_of_the_same_words_is_refused(self):
        def loss(self, hidden, labels):
            logits = torch.matmul(hidden, self.lm_head.weight.T)
            return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))

        model = model_with(loss, dtype=torch.float32)
        step = tiny_inputs(model)
        use_tied_loss(model)(**step).loss.backward()
        for training in (True, False):
            with pytest.raises(TyingError, match=r"cannot be computed in torch.float32 \(its forward does not"):
                use_tied_loss(model, head_dtype="float32").train(training)(**step)
        assert use_tied_loss(model)(**step).loss.isfinite()  # the way out

    def test_a_head_that_is_not_the_softmax_matrix_is_refused_and_nothing_is_changed(self):
        """DeBERTa's newer head multiplies by the embedding, and names a square layer before it as its output."""
        model = tiny_model("deberta-v2", legacy=False)
        kind = type(model)
        with pytest.raises(TyingError, match=r"lm_predictions.lm_head.dense.weight', of \d+ rows, and the vocabulary"):
            use_tied_loss(model, head_dtype="float32")
        assert type(model) is kind
        assert use_tied_loss(model).train()(**tiny_inputs(model)).loss.isfinite()  # the way out

    @pytest.mark.parametrize("given", ["bfloat16", "half", "int64", torch.float16, 32])
    def test_an_unknown_dtype_is_refused(self, given):
        with pytest.raises(ValueError, match="expected 'float32', 'float64' or None"):
            use_tied_loss(tiny_model("llama"), head_dtype=given)

    @pytest.mark.parametrize("beside", [{"objective": AugmentedObjective()}, {"backend": "liger"}], ids=str)
    def test_what_is_computed_otherwise_is_refused(self, beside):
        model = tiny_model("llama")
        with pytest.raises(TyingError, match="expected no head_dtype beside it, got 'float32'"):
            use_tied_loss(model, head_dtype="float32", **beside)
        assert type(model) is type(tiny_model("llama"))
        with pytest.raises(ValueError, match="use backend='torch'"):
            tied_cross_entropy(
                torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1).long(), backend="liger", head_dtype=torch.float32
            )


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_is_that_of_torch(with_bias):
    tensors = [torch.randn(3, 4, 5), torch.randn(7, 5), torch.randn(7)][: 2 + with_bias]
    tensors = [leaf(x.double()) for x in tensors]
    bias = tensors[2] if with_bias else None
    assert torch.autograd.gradcheck(lambda *t: wide_linear(t[0], t[1], bias, torch.float64), tensors)
    torch.testing.assert_close(
        wide_linear(*tensors[:2], bias, torch.float64), nn.functional.linear(*tensors[:2], bias)
    )
    narrow = [x.detach().bfloat16() for x in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.func.vmap(lambda x: wide_linear(x, *narrow[1:2], bias, torch.float32))(narrow[0])
    wanted = nn.functional.linear(*(x.double() for x in narrow[:2]), bias)
    assert found.dtype == torch.float32 and error(found.detach(), wanted.detach()) < 1e-6
    doubled = torch.func.grad(lambda x: wide_linear(x, tensors[1], bias, torch.float64).square().sum())(tensors[0])
    torch.testing.assert_close(doubled, 2 * F.linear(*tensors[:2], bias) @ tensors[1])
