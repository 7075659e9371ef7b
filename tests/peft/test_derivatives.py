"""Whatever can be derived through `F.linear` can be derived through an adapted layer, with the same numbers.

Each use of a model is tried with LoRA too, which is the control: what it can, Tied-LoRA can.
"""

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from hf_tying.peft import TiedLoraConfig
from hf_tying.peft.layer import TiedLoraLayer
from hf_tying.peft.scaled_linear import scaled_linear

from ..tiny import tiny_config, tiny_inputs

CONFIGS = {
    "LoRA": (LoraConfig, {}),
    "TL6": (TiedLoraConfig, {}),
    "TL5": (TiedLoraConfig, {"variant": "TL5", "alpha": 8}),
    "VeRA": (TiedLoraConfig, {"train_A": False, "train_B": False, "share_by": "all"}),
}
every_config = pytest.mark.parametrize("kind", CONFIGS)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Product(nn.Module):
    """Two adapted layers of one input, so that a second derivative is not constant."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        return self.q_proj(x) * self.k_proj(x).tanh()


def adapted(kind: str, base: nn.Module, **settings):
    """`base` in float64 under an adapter that is not zero."""
    config_class, own = CONFIGS[kind]
    targets = ["q_proj", "k_proj", "v_proj"]
    model = get_peft_model(base.double(), config_class(r=4, target_modules=targets, **own, **settings))
    model = model.double().eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(random(*parameter.shape, seed=i) / 2)
    return model


def merged(model: nn.Module) -> nn.Module:
    """The same function of the input, of plain `nn.Linear`."""
    return copy.deepcopy(model).merge_and_unload()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def close(found, expected, tolerance=1e-9) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("u", [True, False])
@pytest.mark.parametrize("v", [True, False])
class TestTheFunction:
    def arguments(self, shape, u, v):
        factors = random(*shape), random(5, 4, seed=1), random(4, seed=2), random(5, seed=3)
        low, b, of_u, of_v = (factor.requires_grad_() for factor in factors)
        return low, b, of_u if u else None, of_v if v else None, 0.5

    def test_its_derivatives_are_those_of_finite_differences(self, shape, u, v):
        arguments = self.arguments(shape, u, v)
        everything = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
        assert torch.autograd.gradcheck(scaled_linear, arguments, **everything)
        assert torch.autograd.gradgradcheck(scaled_linear, arguments, check_fwd_over_rev=True)

    def test_it_is_linear_with_the_product_of_its_factors(self, shape, u, v):
        low, b, of_u, of_v, scaling = self.arguments(shape, u, v)
        weight = scaling * torch.diag(of_v if v else torch.ones(5).double()) @ b
        weight = weight @ torch.diag(of_u if u else torch.ones(4).double())
        assert close(scaled_linear(low, b, of_u, of_v, scaling), F.linear(low, weight), 1e-12)


@every_config
class TestAModel:
    def test_a_penalty_on_a_gradient_trains_every_factor(self, kind):
        model = adapted(kind, Product())
        x = random(3, 6).requires_grad_()

        def penalty():
            (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            return gradient.square().sum()

        penalty().backward()
        for parameter in trained(model).values():
            index = (0,) * parameter.dim()
            values = []
            for change in (1e-5, -2e-5):
                parameter.data[index] += change
                values.append(penalty().item())
            parameter.data[index] += 1e-5
            numeric = (values[0] - values[1]) / 2e-5
            assert parameter.grad[index].item() == pytest.approx(numeric, rel=1e-4, abs=1e-6)

    def test_a_product_with_the_hessian_is_that_of_the_merged_model(self, kind):
        model = adapted(kind, Product())
        x, direction = random(3, 6), random(3, 6, seed=1)
        found, expected = (
            torch.autograd.functional.hvp(lambda at: one(at).square().sum(), x, direction)[1]  # noqa: B023
            for one in (model, merged(model))
        )
        assert close(found, expected)

    def test_forward_mode_gives_what_the_merged_model_gives(self, kind):
        model = adapted(kind, Product())
        x, direction = random(3, 6), random(3, 6, seed=1)
        expected = jvp(merged(model), (x,), (direction,))[1]
        assert close(jvp(model, (x,), (direction,))[1], expected)
        with forward_ad.dual_level():
            assert close(forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent, expected)

    def test_gradients_of_single_samples_are_those_of_a_loop(self, kind):
        model = adapted(kind, Product())
        weights = {name: parameter.detach() for name, parameter in trained(model).items()}
        x = random(4, 6)
        found = vmap(grad(lambda w, one: functional_call(model, w, (one[None],)).sum()), in_dims=(None, 0))(weights, x)
        for i, one in enumerate(x):
            model.zero_grad()
            model(one[None]).sum().backward()
            assert all(close(found[name][i], parameter.grad) for name, parameter in trained(model).items())

    def test_one_vector_is_an_input(self, kind):
        model = adapted(kind, Product())
        x = random(6).requires_grad_()
        model(x).sum().backward()
        assert close(model(x), merged(model)(x)) and x.grad.shape == (6,)

    def test_a_trace_is_saved_and_computes_the_same(self, kind):
        model, file = adapted(kind, Product()), io.BytesIO()
        x = random(3, 6)
        torch.jit.save(torch.jit.trace(model, x), file)
        file.seek(0)
        assert close(torch.jit.load(file)(x), model(x))


def llama(kind, **settings):
    torch.manual_seed(0)
    return adapted(kind, LlamaForCausalLM(tiny_config("llama")), **settings).train()


def offloaded():
    return torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda packed: packed)


def step(model, context=None, seed=3):
    """The loss and the gradients of one step."""
    model.zero_grad()
    torch.manual_seed(seed)
    inputs = tiny_inputs(model.get_base_model())
    if context is None:
        loss = model(**inputs).loss
    else:
        with context():
            loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in trained(model).items()}


WAYS = {
    "checkpointed": {"use_reentrant": False},
    "checkpointed, reentrant": {"use_reentrant": True},
    "offloaded": None,
}


@every_config
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_step_is_the_same_whatever_is_kept_for_the_backward_pass(kind, way, dropout):
    model = llama(kind, **{"lora_dropout" if kind == "LoRA" else "dropout": dropout})
    loss, gradients = step(model)
    if WAYS[way]:
        model.gradient_checkpointing_enable(WAYS[way])
        model.enable_input_require_grads()
        found = step(model)
    else:
        found = step(model, offloaded)
    assert close(found[0], loss)
    assert all(close(found[1][name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("way", WAYS)
def test_the_shared_product_is_computed_once_for_each_pass(way, monkeypatch):
    model = llama("TL6")
    calls, stock = [], TiedLoraLayer._down
    for layer_class in {type(m) for m in model.modules() if isinstance(m, TiedLoraLayer)}:
        monkeypatch.setattr(layer_class, "_down", lambda self, *args: calls.append(self) or stock(self, *args))
    if WAYS[way]:
        model.gradient_checkpointing_enable(WAYS[way])
        model.enable_input_require_grads()
    step(model, None if WAYS[way] else offloaded)
    layers = model.config.num_hidden_layers
    assert len(calls) == layers * (2 if WAYS[way] else 1)


@every_config
def test_under_dropout_each_module_draws_its_own_mask_as_in_lora(kind):
    model = adapted(kind, Product(), **{"lora_dropout" if kind == "LoRA" else "dropout": 0.5}).train()
    drawn = []
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.register_forward_hook(lambda module, args, output: drawn.append(output.detach()))
    torch.manual_seed(0)
    model(torch.ones(64, 6, dtype=torch.float64))
    assert len(drawn) == 2 and not torch.equal(*drawn)
