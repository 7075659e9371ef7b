"""`fit_from_lora`: the tied adapter next to a LoRA adapter; no step makes it worse, and exact where it can be."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_tying.peft import TiedLoraConfig, export_to_lora, fit_from_lora
from hf_tying.peft.fitting.alternating import Problem, Update
from hf_tying.peft.fitting.fit import fit_updates
from hf_tying.peft.fitting.starting import starting_factors
from hf_tying.peft.sharing import name_factors

from ..tied_lora import QKV, dense_updates, layers_of, outputs, tied_lora
from ..tiny import tiny_model

TIED = ["tie_A", "tie_B", "tie_qkv", "train_u", "train_v"]


def lora_model(base, seed=0, **config):
    """A LoRA adapter with random factors."""
    model = get_peft_model(base, LoraConfig(**({"r": 3, "lora_alpha": 6} | config)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def dense_of_lora(model):
    """The updates as PEFT merges them, `(out, in)`."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "get_delta_weight"):
            delta = layer.get_delta_weight("default").detach()
            transposed = isinstance(layer.get_base_layer(), Conv1D | nn.Embedding)
            found[name.removeprefix("base_model.model.")] = delta.T if transposed else delta
    return found


def distance(first, second):
    """|| first - second || / || first ||, over all modules."""
    assert first.keys() == second.keys()
    square = sum(((first[name] - second[name]) ** 2).sum() for name in first)
    return (square / sum((update**2).sum() for update in first.values())).sqrt().item()


def loaded(base, folder):
    return PeftModel.from_pretrained(base, folder).eval()


def best_of_random_starts(dense, r, starts=64, sweeps=200):
    """The smallest || dense - B diag(u) A || that plain alternation finds, with one u for each layer.

    q, k and v share A and u, and their B stand in one matrix: that is the trilinear model of a tensor, `(layers, out,
    in)`. All starts are computed at once.
    """
    generator = torch.Generator().manual_seed(7)
    u, b, a = (torch.randn(starts, size, r, generator=generator, dtype=torch.float64) for size in dense.shape)

    def solved(of, first, second):  # torch.linalg.lstsq on the normal equations
        return torch.linalg.lstsq((first.mT @ first) * (second.mT @ second), of.mT).solution.mT

    for _ in range(sweeps):
        b = solved(torch.einsum("loi,slr,sir->sor", dense, u, a), u, a)
        u = solved(torch.einsum("loi,sor,sir->slr", dense, b, a), b, a)
        a = solved(torch.einsum("loi,slr,sor->sir", dense, u, b), u, b)
    return (dense - torch.einsum("slr,sor,sir->sloi", u, b, a)).flatten(1).norm(dim=1).min().item()


class TestAnAdapterThatIsTiedIsFoundAgain:
    @pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "marian", "t5"])
    @pytest.mark.parametrize("variant", ["TL5", "TL6"])
    def test_a_tied_adapter_is_found_again_in_its_export_in_each_architecture(self, arch, variant, tmp_path):
        changes = {"num_key_value_heads": 1} if arch == "llama" else {}
        tied = tied_lora(tiny_model(arch, **changes), variant=variant, r=3)
        export_to_lora(tied, tmp_path / "lora")
        fit = fit_from_lora(tmp_path / "lora", 3, tmp_path / "tied", variant)
        assert fit.error < 1e-6
        again = loaded(tiny_model(arch, **changes), tmp_path / "tied")
        assert type(again.peft_config["default"]) is TiedLoraConfig
        assert distance(dense_updates(tied), dense_updates(again)) < 1e-6
        assert fit.parameters == sum(p.numel() for n, p in tied.named_parameters() if "tied_lora_" in n)

    @settings(max_examples=15, deadline=None)
    @given(
        switches=st.fixed_dictionaries({name: st.booleans() for name in TIED}),
        share_by=st.sampled_from(["module", "shape", "all"]),
        targets=st.sampled_from([["q_proj", "k_proj", "v_proj"], "all-linear", ["o_proj", "q_proj", "embed_tokens"]]),
        negative=st.booleans(),
    )
    def test_a_tied_adapter_is_found_again_in_its_export_whatever_it_shares(
        self, switches, share_by, targets, negative, tmp_path_factory
    ):
        folder = tmp_path_factory.mktemp("fit")
        config = dict(switches, share_by=share_by)
        base = tiny_model("llama", num_hidden_layers=3, num_key_value_heads=1)
        tied = tied_lora(base, r=2, alpha=5, target_modules=targets, **config)
        if negative:  # u and v of both signs
            with torch.no_grad():
                for name, parameter in tied.named_parameters():
                    if "tied_lora_u" in name or "tied_lora_v" in name:
                        parameter.copy_(torch.randn_like(parameter))
        export_to_lora(tied, folder / "lora")
        fit = fit_from_lora(folder / "lora", 2, alpha=3, **config)
        assert fit.error < 1e-4


class TestAnyOther:
    @settings(max_examples=15, deadline=None)
    @given(
        switches=st.fixed_dictionaries({name: st.booleans() for name in TIED}),
        share_by=st.sampled_from(["module", "shape", "all"]),
        r=st.integers(1, 6),
        seed=st.integers(0, 99),
    )
    def test_no_sweep_makes_the_error_grow(self, switches, share_by, r, seed):
        config = TiedLoraConfig(r=r, target_modules=["q_proj"], share_by=share_by, **switches)
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        widths = {"q_proj": (12, 10), "k_proj": (6, 10), "v_proj": (6, 7)}
        updates, sizes = {}, {}
        for layer in range(3):
            for name, (rows, columns) in widths.items():
                module = f"layers.{layer}.{name}"
                updates[module] = Update(draw(rows, 3), draw(3, columns))
                sizes[module] = "linear", columns, rows
        names = name_factors(config, sizes)
        problem = Problem(updates, names, r, config.train_u, config.train_v)
        for start in starting_factors(problem, 1):
            problem.factors = start
            problem.balance()
            before = float(sum(problem.errors().values()))
            for _ in range(6):
                problem.run(1, 0)
                # The error is what it says, by matrices of the size of the modules.
                dense = {}
                for module, update in updates.items():
                    a, b, u, v = problem.factors_of(module)
                    dense[module] = ((update.left @ update.right - v[:, None] * b * u @ a) ** 2).sum()
                assert sum(dense.values()).item() == pytest.approx(problem.error, abs=1e-9 * float(problem.norm))
                assert problem.error <= before
                before = problem.error
            problem.balance()
            assert float(sum(problem.errors().values())) == pytest.approx(before, abs=1e-9 * float(problem.norm))

    @pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
    def test_the_error_is_that_of_the_loaded_adapter(self, arch, tmp_path):
        lora = lora_model(tiny_model(arch), target_modules=QKV[arch])
        lora.save_pretrained(tmp_path / "lora")
        fit = fit_from_lora(tmp_path / "lora", 4, tmp_path / "tied", iterations=40)
        tied = loaded(tiny_model(arch), tmp_path / "tied")
        expected, found = dense_of_lora(lora), dense_updates(tied)
        assert 0.05 < fit.error < 1
        assert distance(expected, found) == pytest.approx(fit.error, rel=1e-4)
        for module, error in fit.errors.items():
            assert distance({module: expected[module]}, {module: found[module]}) == pytest.approx(error, rel=1e-3)
        assert fit.lora_parameters == sum(p.numel() for n, p in lora.named_parameters() if ".lora_" in n)
        assert fit.parameters < fit.lora_parameters and fit.iterations > 1

    def test_more_rank_and_fewer_ties_lose_less(self, tmp_path):
        lora_model(tiny_model("llama"), target_modules=QKV["llama"]).save_pretrained(tmp_path)
        errors = [fit_from_lora(tmp_path, r, iterations=60).error for r in (1, 3, 8)]
        assert errors == sorted(errors, reverse=True)
        untied = fit_from_lora(tmp_path, 3, tie_A=False, tie_B=False, tie_qkv=False)
        assert untied.error < 1e-6

    def test_gradient_descent_finds_no_better_fit(self, tmp_path):
        lora = lora_model(tiny_model("llama"), target_modules=QKV["llama"])
        lora.save_pretrained(tmp_path)
        fit = fit_from_lora(tmp_path, 3, tmp_path / "tied", tolerance=1e-4)
        tied = loaded(tiny_model("llama"), tmp_path / "tied")
        expected = dense_of_lora(lora)
        factors = [p.requires_grad_() for n, p in tied.named_parameters() if "tied_lora_" in n]
        optimizer = torch.optim.Adam(factors, 1e-3)
        for _ in range(25):
            loss = sum(
                ((layer.get_delta_weight("default") - expected[name]) ** 2).sum()
                for name, layer in layers_of(tied).items()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert distance(expected, dense_updates(tied)) > fit.error * 0.99

    @pytest.mark.parametrize(
        "layers,sizes,r,seed",
        [
            (4, {"q_proj": 24}, 2, 1),
            (4, {"q_proj": 24}, 4, 1),
            (2, {"q_proj": 32, "k_proj": 8, "v_proj": 8}, 4, 0),
        ],
    )
    def test_without_v_it_is_as_good_as_the_best_of_many_random_starts(self, layers, sizes, r, seed):
        generator = torch.Generator().manual_seed(seed)
        updates = {
            f"layers.{layer}.{name}": Update(*(torch.randn(n, 3, generator=generator).double() for n in (rows, 20)))
            for layer in range(layers)
            for name, rows in sizes.items()
        }
        updates = {module: Update(update.left, update.right.T) for module, update in updates.items()}
        config = TiedLoraConfig(r=r, target_modules=list(sizes), train_v=False)
        _, errors, _ = fit_updates(config, updates, dict.fromkeys(updates, "linear"))
        dense = torch.stack(
            [torch.cat([(u := updates[f"layers.{i}.{n}"]).left @ u.right for n in sizes]) for i in range(layers)]
        )
        assert sum(errors.values()) ** 0.5 < 1.001 * best_of_random_starts(dense, r)

    def test_a_fit_in_float32_has_the_same_error(self, tmp_path):
        lora_model(tiny_model("llama"), target_modules=QKV["llama"]).save_pretrained(tmp_path)
        fits = [fit_from_lora(tmp_path, 3, dtype=dtype, iterations=40) for dtype in (torch.float32, torch.float64)]
        assert fits[0].error == pytest.approx(fits[1].error, rel=0.02)


def test_the_factors_are_of_like_sizes_so_that_training_can_go_on(tmp_path):
    lora_model(tiny_model("llama"), target_modules=QKV["llama"]).save_pretrained(tmp_path)
    fit = fit_from_lora(tmp_path, 3, iterations=10)
    found = {kind: [t for name, t in fit.tensors.items() if f"tied_lora_{kind}." in name] for kind in "ABuv"}
    for kind in "uv":
        for rows in found[kind]:
            assert torch.allclose((rows**2).mean(0).sqrt(), torch.ones(rows.shape[1]), atol=1e-4)
    of_a = sum((a**2).sum(1) for a in found["A"])
    of_b = sum((b**2).sum(0) for b in found["B"])
    assert torch.allclose(of_a, of_b, rtol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_ranks_alphas_and_scalings_of_lora_are_its_own(rslora, tmp_path):
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"k_proj": 11, "^model.*v_proj": 2}}
    lora = lora_model(tiny_model("llama"), target_modules=QKV["llama"], use_rslora=rslora, **patterns)
    lora.save_pretrained(tmp_path / "lora")
    fit_from_lora(tmp_path / "lora", 5, tmp_path / "tied", tie_A=False, tie_B=False, tie_qkv=False, alpha=12)
    tied = loaded(tiny_model("llama"), tmp_path / "tied")
    assert distance(dense_of_lora(lora), dense_updates(tied)) < 1e-5


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 6)
        self.mix = Conv1D(10, 6)
        self.out = nn.Linear(10, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, ids):
        return self.last(self.out(torch.tanh(self.mix(self.words(ids)))))


def test_embeddings_conv1d_and_modules_to_save_are_fitted_too(tmp_path):
    lora = lora_model(Words(), target_modules=["words", "mix", "out"], modules_to_save=["last"], bias="lora_only")
    with torch.no_grad():
        lora.base_model.model.last.modules_to_save["default"].weight.add_(1)
    lora.save_pretrained(tmp_path / "lora")
    # Each module is alone here, and so nothing is lost.
    fit = fit_from_lora(tmp_path / "lora", 3, tmp_path / "tied")
    assert fit.error < 1e-6
    tied = loaded(Words(), tmp_path / "tied")
    assert tied.peft_config["default"].bias == "tied_lora_only"
    ids = torch.arange(12).view(2, 6)
    assert torch.allclose(tied(ids), lora(ids), atol=1e-5)


def test_an_adapter_of_zeros_is_fitted_by_zeros(tmp_path):
    get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    fit = fit_from_lora(tmp_path / "lora", 2, tmp_path / "tied")
    assert fit.error == 0 and all(torch.isfinite(tensor).all() for tensor in fit.tensors.values())
    assert torch.allclose(outputs(loaded(tiny_model("llama"), tmp_path / "tied")), outputs(tiny_model("llama")))


class TestRefused:
    def refused(self, tmp_path, message, **config):
        lora_model(tiny_model("llama"), **({"target_modules": ["q_proj"]} | config)).save_pretrained(tmp_path / "lora")
        with pytest.raises(ValueError, match=message):
            fit_from_lora(tmp_path / "lora", 2, tmp_path / "out")
        assert os.listdir(tmp_path) == ["lora"]

    def test_dora_is_refused(self, tmp_path):
        self.refused(tmp_path, "use_dora=True: DoRA also scales", use_dora=True)

    def test_single_trained_tokens_are_refused(self, tmp_path):
        self.refused(tmp_path, "trainable_token_indices", trainable_token_indices=[1])

    def test_a_bias_of_lora_is_refused(self, tmp_path):
        self.refused(tmp_path, "lora_bias=True", lora_bias=True)

    def test_a_changed_base_model_is_refused(self, tmp_path):
        self.refused(tmp_path, "changed base model", init_lora_weights="pissa")

    def test_factors_that_are_no_matrices_are_refused(self, tmp_path):
        model = lora_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), target_modules=["0"])
        model.save_pretrained(tmp_path / "lora")
        with pytest.raises(ValueError, match="only linear layers and embeddings"):
            fit_from_lora(tmp_path / "lora", 2)

    def test_another_adapter_type_and_a_rank_that_is_too_high_are_refused(self, tmp_path):
        tied_lora(tiny_model("llama")).save_pretrained(tmp_path / "tied")
        with pytest.raises(ValueError, match="of type TIED_LORA: expected LORA"):
            fit_from_lora(tmp_path / "tied", 2)
        export_to_lora(tmp_path / "tied", tmp_path / "lora")
        with pytest.raises(ValueError, match="r=17 is more than any adapted module has"):
            fit_from_lora(tmp_path / "lora", 17)
        with pytest.raises(ValueError, match="contradicts variant"):
            fit_from_lora(tmp_path / "lora", 2, variant="TL5", train_u=True)


def test_the_result_is_saved_when_asked_and_has_the_dtype_of_the_adapter(tmp_path):
    model = lora_model(tiny_model("llama"), target_modules=QKV["llama"], task_type="CAUSAL_LM").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "lora")
    fit = fit_from_lora(tmp_path / "lora", 3, iterations=5)
    assert os.listdir(tmp_path) == ["lora"]
    fit.save(tmp_path / "tied")
    assert {tensor.dtype for tensor in fit.tensors.values()} == {torch.bfloat16}
    # What is reported is what is in the file, its rounding included.
    exact = {m: d.float() for m, d in dense_of_lora(model.float()).items()}
    again = dense_updates(loaded(tiny_model("llama"), tmp_path / "tied"))
    assert distance(exact, again) == pytest.approx(fit.error, rel=1e-3)
    config = json.loads((tmp_path / "tied" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["variant"]) == ("TIED_LORA", "CAUSAL_LM", "TL6")
    assert config["target_modules"] == list(fit.errors)
