"""Tied-LoRA: the update is diag(v) B diag(u) A, with A and B one parameter for all layers."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, VeraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_tying.peft import TiedLoraConfig
from hf_tying.peft.config import SWITCHES, VARIANTS
from hf_tying.peft.scaled_linear import scaled_linear

from ..tied_lora import QKV, dense_updates, layers_of, merged_by_hand, outputs, tied_lora
from ..tiny import tiny_inputs, tiny_model

ARCHS = ["llama", "gpt2", "bert", "t5", "marian"]


def trainable(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("variant", ["TL5", "TL6"])
def test_the_adapted_model_is_the_base_with_the_plain_update_added(arch, variant):
    model = tied_lora(tiny_model(arch), variant=variant, alpha=6)
    expected = outputs(merged_by_hand(model, tiny_model(arch)))
    assert torch.allclose(outputs(model), expected, atol=1e-5)
    assert not torch.allclose(expected, outputs(tiny_model(arch)), atol=1e-3)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_new_adapter_changes_nothing(arch):
    model = get_peft_model(tiny_model(arch), TiedLoraConfig(r=4, target_modules=QKV[arch])).eval()
    assert torch.equal(outputs(model), outputs(tiny_model(arch)))


@pytest.mark.parametrize(
    ("trained", "zero"), [("ABuv", "B"), ("AB", "B"), ("Auv", "v"), ("uv", "v"), ("Au", "u"), ("u", "u"), ("A", "A")]
)
def test_one_factor_of_a_new_adapter_starts_at_zero_and_no_other(trained, zero):
    switches = {f"train_{kind}": kind in trained for kind in "ABuv"}
    model = get_peft_model(tiny_model("llama"), TiedLoraConfig(r=4, target_modules=["q_proj"], **switches))
    factors = {name: value for name, value in model.named_parameters() if "tied_lora_" in name}
    assert {name.partition("tied_lora_")[2][0] for name, value in factors.items() if not value.any()} == {zero}
    assert {name.partition("tied_lora_")[2][0] for name in factors} == {"A", "B", *trained}


@st.composite
def switches(draw):
    values = {name: draw(st.booleans()) for name in SWITCHES}
    if not any(values[f"train_{kind}"] for kind in "ABuv"):
        values["train_" + draw(st.sampled_from("ABuv"))] = True
    return values


class TestEveryCombinationOfTheSwitches:
    @settings(max_examples=40, deadline=None)
    @given(
        switches=switches(),
        share_by=st.sampled_from(["module", "shape", "all"]),
        layer_groups=st.sampled_from([None, [[0, 2], [1]], [[0], [1], [2]]]),
        targets=st.sampled_from([["q_proj", "k_proj", "v_proj"], "all-linear", ["o_proj", "q_proj", "down_proj"]]),
    )
    def test_every_combination_of_the_switches_is_its_plain_update_and_trains_and_shares_what_it_says(
        self, switches, share_by, layer_groups, targets
    ):
        config = dict(switches, share_by=share_by, layer_groups=layer_groups, target_modules=targets)
        base = tiny_model("llama", num_hidden_layers=3, num_key_value_heads=1)
        fresh = get_peft_model(base, TiedLoraConfig(r=3, **config)).eval()
        assert torch.equal(outputs(fresh), outputs(base := fresh.unload()))

        model = tied_lora(base, r=3, alpha=4.5, **config)
        plain = tiny_model("llama", num_hidden_layers=3, num_key_value_heads=1)
        assert torch.allclose(outputs(model), outputs(merged_by_hand(model, plain)), atol=1e-4)

        model.train()
        model(**tiny_inputs(model.get_base_model())).loss.backward()
        for name, parameter in model.named_parameters():
            kind = name.partition("tied_lora_")[2][:1]
            expected = bool(kind) and switches[f"train_{kind}"]
            assert parameter.requires_grad == expected, name
            assert (parameter.grad is not None and bool(parameter.grad.any())) == expected, name

        for module, layer in layers_of(model).items():
            for other, second in layers_of(model).items():
                if module == other:
                    continue
                first_layer, second_layer = (int(name.split(".")[2]) for name in (module, other))
                together = next(
                    (g for g in layer_groups or [[0, 1, 2]] if first_layer in g and second_layer in g), None
                )
                for kind in "AB":
                    if first_layer != second_layer and not (switches[f"tie_{kind}"] and together):
                        assert getattr(layer.uses["default"], kind) is not getattr(second.uses["default"], kind)
                    elif (
                        share_by == "all"
                        or module.partition(str(first_layer))[2] == other.partition(str(second_layer))[2]
                    ):
                        assert getattr(layer.uses["default"], kind) is getattr(second.uses["default"], kind)
                qkv = all(name.endswith(("q_proj", "k_proj", "v_proj")) for name in (module, other))
                if switches["train_u"]:
                    one_u = layer.uses["default"].u is second.uses["default"].u
                    assert one_u == (first_layer == second_layer and qkv and switches["tie_qkv"])


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_variant_is_its_switches_and_the_switches_are_the_variant(variant):
    assert TiedLoraConfig(**VARIANTS[variant]).variant == variant
    config = TiedLoraConfig(variant=variant)
    assert {name: getattr(config, name) for name in SWITCHES} == VARIANTS[variant]
    assert TiedLoraConfig().variant == "TL6"
    assert TiedLoraConfig(train_A=False).variant is None


class TestThePapersCount:
    """LLaMA2-7B: L = 32, d = 4096; q, k and v, r = 8."""

    def model(self, config):
        sizes = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        with torch.device("meta"):
            return get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32)), config)

    def test_tl6_has_4dr_and_l_times_r_and_3d_parameters_and_is_12_51_percent_of_lora(self):
        d, r, layers = 4096, 8, 32
        tl6 = trainable(self.model(TiedLoraConfig()))
        lora = trainable(self.model(LoraConfig(r=r, target_modules=QKV["llama"])))
        assert tl6 == 4 * d * r + layers * (r + 3 * d)
        # The paper's LoRA is on the fused matrix, with one A for the three: 4Ldr.
        assert lora == 6 * layers * d * r
        assert round(100 * tl6 / (4 * layers * d * r), 2) == 12.51

    def test_tl5_has_4dr_parameters(self):
        assert trainable(self.model(TiedLoraConfig(variant="TL5"))) == 4 * 4096 * 8 == 131_072


def same_training(first, second, steps=4, lr=0.05):
    """The losses of two models on the same batches."""
    losses = []
    for model in (first, second):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
        model.train()
        batch = tiny_inputs(model.get_base_model())
        run = []
        for _ in range(steps):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(loss.item())
        losses.append(run)
    return losses


class TestCorners:
    def test_without_ties_and_vectors_tied_lora_is_lora(self):
        untied = dict.fromkeys(("tie_A", "tie_B", "tie_qkv", "train_u", "train_v"), False)
        ours = tied_lora(tiny_model("llama"), alpha=2, **untied)
        lora = get_peft_model(
            tiny_model("llama"), LoraConfig(r=4, lora_alpha=2, target_modules=QKV["llama"], init_lora_weights=False)
        )
        assert trainable(ours) == trainable(lora)
        with torch.no_grad():
            for name, layer in layers_of(ours).items():
                theirs = lora.base_model.model.get_submodule(name)
                theirs.lora_A["default"].weight.copy_(layer.uses["default"].A.weight)
                theirs.lora_B["default"].weight.copy_(layer.uses["default"].B.weight)
        assert torch.allclose(outputs(ours), outputs(lora.eval()), atol=1e-6)
        ours_losses, lora_losses = same_training(ours, lora)
        assert ours_losses == pytest.approx(lora_losses, rel=1e-5) and ours_losses[0] != ours_losses[-1]

    def test_with_frozen_matrices_for_all_modules_tied_lora_is_vera(self):
        ours = tied_lora(
            tiny_model("llama"), r=5, train_A=False, train_B=False, tie_qkv=False, share_by="all", u_initial=0.1
        )
        vera = get_peft_model(tiny_model("llama"), VeraConfig(r=5, target_modules=QKV["llama"]))
        assert trainable(ours) == trainable(vera)
        with torch.no_grad():
            for name, layer in layers_of(ours).items():
                theirs, use = vera.base_model.model.get_submodule(name), layer.uses["default"]
                theirs.vera_A["default"].copy_(use.A.weight)
                theirs.vera_B["default"].copy_(use.B.weight)
                theirs.vera_lambda_d["default"].copy_(use.u.weight)
                theirs.vera_lambda_b["default"].copy_(layer.tied_lora_v["default"].weight)
        assert torch.allclose(outputs(ours), outputs(vera.eval()), atol=1e-6)
        ours_losses, vera_losses = same_training(ours, vera)
        assert ours_losses == pytest.approx(vera_losses, rel=1e-5) and ours_losses[0] != ours_losses[-1]

    def test_tied_lora_in_the_form_of_vera_starts_as_vera_does(self):
        config = TiedLoraConfig(
            r=4, train_A=False, train_B=False, tie_qkv=False, share_by="all", u_initial=0.1, target_modules=QKV["bert"]
        )
        use = next(iter(layers_of(get_peft_model(tiny_model("bert"), config)).values()))
        assert torch.all(use.uses["default"].u.weight == 0.1) and not use.tied_lora_v["default"].weight.any()
        assert use.uses["default"].B.weight.any()


class TestTheGradient:
    def test_the_gradient_of_a_shared_matrix_is_the_sum_over_the_modules_of_an_untied_twin(self):
        tied = tied_lora(tiny_model("llama"))
        alone = dict.fromkeys(("tie_A", "tie_B"), False)
        untied = tied_lora(tiny_model("llama"), **alone)
        with torch.no_grad():
            for (_, mine), (_, theirs) in zip(layers_of(tied).items(), layers_of(untied).items(), strict=True):
                for kind in "ABu":
                    factor = getattr(theirs.uses["default"], kind)
                    factor.weight.copy_(getattr(mine.uses["default"], kind).weight)
                theirs.tied_lora_v["default"].weight.copy_(mine.tied_lora_v["default"].weight)
        for model in (tied, untied):
            model(**tiny_inputs(model.get_base_model())).loss.backward()
        for kind in "AB":
            factors = {
                id(getattr(x.uses["default"], kind)): getattr(x.uses["default"], kind)
                for x in layers_of(tied).values()
            }
            for factor in factors.values():
                parts = {
                    id(theirs.uses["default"].factor(kind)): theirs.uses["default"].factor(kind).weight.grad
                    for mine, theirs in zip(layers_of(tied).values(), layers_of(untied).values(), strict=True)
                    if getattr(mine.uses["default"], kind) is factor
                }
                assert len(parts) > 1
                assert torch.allclose(factor.weight.grad, sum(parts.values()), atol=1e-6)


class TestTheScaledProduct:
    @pytest.mark.parametrize("u", [True, False])
    @pytest.mark.parametrize("v", [True, False])
    @pytest.mark.parametrize("scaling", [1.0, 1.7])
    def test_scaled_linear_has_the_value_and_the_gradients_of_the_plain_form(self, u, v, scaling):
        torch.manual_seed(0)
        shapes = {"low": (3, 5, 4), "b": (6, 4)} | ({"u": (4,)} if u else {}) | ({"v": (6,)} if v else {})
        given = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}

        def plain(low, b, u=None, v=None):
            columns = torch.ones(4, dtype=low.dtype) if u is None else u
            return scaling * low @ torch.diag(columns) @ b.T * (1 if v is None else v)

        def ours(low, b, u=None, v=None):
            return scaled_linear(low, b, u, v, scaling)

        assert torch.allclose(ours(**given), plain(**given))
        with torch.no_grad():
            assert torch.allclose(ours(**given), plain(**given))
        assert torch.autograd.gradcheck(
            lambda *values: ours(**dict(zip(given, values, strict=True))), (*given.values(),)
        )

    def test_scaled_linear_gives_no_gradient_to_what_is_frozen(self):
        low, b, u, v = torch.randn(5, 4), torch.randn(6, 4), torch.randn(4), torch.randn(6, requires_grad=True)
        scaled_linear(low, b, u, v).sum().backward()
        assert v.grad is not None and b.grad is None and u.grad is None and low.grad is None

    def test_scaled_linear_keeps_for_the_backward_pass_only_what_it_was_given(self):
        low, b, u, v = (torch.randn(n, 4, requires_grad=True) for n in (50, 60, 1, 15))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            out = scaled_linear(low, b, u.flatten(), v.flatten(), 2.0)
        out.sum().backward()
        assert set(kept) == {tensor.data_ptr() for tensor in (low, b, u, v)}


class TestTheSharedInput:
    def test_a_shared_input_is_multiplied_by_a_once_for_query_key_and_value(self, monkeypatch):
        model = tied_lora(tiny_model("llama"))
        layer = layers_of(model)["model.layers.0.self_attn.q_proj"]
        calls, stock = [], type(layer)._down
        monkeypatch.setattr(type(layer), "_down", lambda self, *args: calls.append(self) or stock(self, *args))
        outputs(model)
        assert len(calls) == 2  # one for each layer, and not three
        assert all(not use.slot._kept for x in layers_of(model).values() for use in x.uses.values())

    def test_a_product_is_not_taken_for_another_input_or_for_an_earlier_one(self):
        model = tied_lora(tiny_model("llama"))
        q, k = (layers_of(model)[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "k_proj"))
        first, second = torch.randn(2, 3, 16)
        with torch.no_grad():
            q(first)
            assert torch.allclose(
                k(second), k.base_layer(second) + second @ dense_updates(model)[k.module_name].T, atol=1e-5
            )
            q(first)
            first.mul_(2)  # the same tensor, another value
            assert torch.allclose(
                k(first), k.base_layer(first) + first @ dense_updates(model)[k.module_name].T, atol=1e-5
            )
            for module in (q, k):
                q(first)
                q.uses["default"].A.weight.mul_(3)
                assert torch.allclose(
                    module(first),
                    module.base_layer(first) + first @ dense_updates(model)[module.module_name].T,
                    atol=1e-4,
                )

    def test_a_product_computed_without_a_gradient_does_not_serve_where_one_is_wanted(self):
        model = tied_lora(tiny_model("llama"))
        q, k = (layers_of(model)[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "k_proj"))
        x = torch.randn(3, 16)
        with torch.no_grad():
            q(x)
        k(x).sum().backward()
        assert k.uses["default"].A.weight.grad.any()

    def test_a_product_that_nobody_takes_keeps_no_graph_alive(self):
        model = tied_lora(tiny_model("llama")).train()
        q = layers_of(model)["model.layers.0.self_attn.q_proj"]
        slot = q.uses["default"].slot
        x = torch.randn(3, 16, requires_grad=True) * 2
        q(x)  # k and v, which would take the value, do not come
        gc.collect()
        assert slot._kept[4]() is None
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda packed: packed):
            q(x)
        assert slot._kept[4]() is not None
        del x
        gc.collect()
        assert slot._kept is None
