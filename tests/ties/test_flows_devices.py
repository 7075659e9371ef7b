"""f14, f15: a tie survives offloading, device maps, the meta device, compilation and export, or is refused."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.hooks import remove_hook_from_submodules
from safetensors.torch import load_file

from hf_tying import TyingConfig, TyingError, assert_tied, tie

from ..forms import reload, tied_model
from ..tiny import logits, tiny_model, without_dropout

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
MAP = {"transformer.wpe": "cpu", "transformer.drop": "cpu", "transformer.h": "cpu", "transformer.ln_f": "cpu"}


@pytest.mark.parametrize("wte, head", [("cpu", "disk"), ("disk", "cpu")])
@pytest.mark.parametrize("save_format", ["dedup", "portable"])
def test_a_device_map_that_splits_a_pair_is_refused_with_the_way_out(form, wte, head, save_format, tmp_path):
    model = tied_model(form, spec=TyingConfig(scheme="two_way", save_format=save_format))
    model.save_pretrained(tmp_path)
    device_map = {**MAP, "transformer.wte": wte, "lm_head": head}
    with pytest.raises(
        TyingError, match=f"device_map splits group 'embeddings': '{WTE}' on '{wte}', '{HEAD}' on '{head}'"
    ):
        reload(model, tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")


@pytest.mark.parametrize("save_format", ["dedup", "portable"])
def test_a_pair_offloaded_to_disk_together_gives_the_same_logits_and_saves_again(form, save_format, tmp_path):
    model = tied_model(form, spec=TyingConfig(scheme="two_way", save_format=save_format))
    model.save_pretrained(tmp_path)
    device_map = {**MAP, "transformer.wte": "disk", "lm_head": "disk"}
    loaded = reload(model, tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    names = {WTE} if save_format == "dedup" else {WTE, HEAD}
    assert load_file(tmp_path / "again" / "model.safetensors").keys() & {WTE, HEAD} == names
    assert torch.equal(logits(reload(model, tmp_path / "again")), logits(model))


def test_an_automatic_device_map_keeps_the_pair_together(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = reload(model, tmp_path, device_map="auto")
    assert_tied(loaded)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_an_offloaded_model_says_how_to_be_saved_and_then_is(model, offload, tmp_path):
    expected = logits(model)
    cpu_offload(model) if offload == "cpu" else disk_offload(model, tmp_path / "offload")
    assert torch.equal(logits(model), expected)
    assert_tied(model)
    with pytest.raises(TyingError, match="remove_hook_from_submodules"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    remove_hook_from_submodules(model)
    model.tie_weights()
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(reload(model, tmp_path / "out")), expected)


class TestMetaDevice:
    def test_init_empty_weights_makes_a_tied_model(self, model):
        with init_empty_weights():
            empty = type(model)(model.config)
        assert empty.lm_head.weight is empty.transformer.wte.weight and empty.lm_head.weight.is_meta

    @pytest.mark.parametrize("retie", [True, False])
    @pytest.mark.parametrize("save_format", ["dedup", "portable"])
    def test_a_checkpoint_dispatched_onto_an_empty_model_fills_every_name(self, form, retie, save_format, tmp_path):
        model = tied_model(form, spec=TyingConfig(scheme="two_way", save_format=save_format))
        model.save_pretrained(tmp_path)
        with init_empty_weights():
            empty = type(model)(model.config)
        if retie:
            empty.tie_weights()
        loaded = load_checkpoint_and_dispatch(empty, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
        assert torch.equal(logits(loaded.eval()), logits(model))
        assert_tied(loaded)

    def test_tie_on_meta_tensors_is_refused(self, model):
        with pytest.raises(TyingError, match="on the meta device and has no value"):
            tie(model.to("meta"), "two_way")

    def test_to_empty_and_a_state_dict_bring_a_meta_model_back(self, model):
        state, expected = model.state_dict(), logits(model)
        state = {name: t.clone() for name, t in state.items()}
        model.to("meta").to_empty(device="cpu").load_state_dict(state, strict=False)
        assert_tied(model)
        assert torch.equal(logits(model), expected)


class TestCompiledAndTraced:
    def test_a_compiled_model_trains_tied(self, model):
        compiled = torch.compile(model.train(), backend="aot_eager")
        ids = torch.arange(8)[None]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = model.lm_head.weight.detach().clone()
        compiled(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        assert not torch.equal(model.lm_head.weight, before)
        assert_tied(compiled)

    def test_gradient_checkpointing_gives_the_same_gradient(self, model):
        model.config.use_cache = False
        ids = torch.arange(8)[None]
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            without_dropout(model).zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            gradients.append(model.lm_head.weight.grad.clone())
        assert torch.allclose(*gradients, atol=1e-7)

    def test_functional_call_replaces_the_one_matrix_under_every_name(self, model):
        without_dropout(model)
        ids = torch.arange(8)[None]
        zeros = {WTE: torch.zeros_like(model.lm_head.weight)}
        out = torch.func.functional_call(model, zeros, kwargs={"input_ids": ids})
        assert torch.equal(out.logits, torch.zeros_like(out.logits))
        assert_tied(model)

    def test_a_tied_model_is_exported(self, model):
        ids = torch.arange(8)[None]
        program = torch.export.export(model, (ids,), kwargs={"use_cache": False}, strict=False)
        assert torch.allclose(program.module()(ids, use_cache=False).logits, model(ids).logits, atol=1e-6)


class TestConversion:
    def convert(self, model, replacing: bool):
        """`.to(float64)`; `replacing`: torch puts a new parameter into each slot."""
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(replacing)
        try:
            return model.to(torch.float64)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)

    @pytest.mark.parametrize("replacing", [False, True])
    def test_what_is_one_stays_one(self, replacing):
        model = self.convert(tie(tiny_model("llama", tie_word_embeddings=True), "two_way"), replacing)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.dtype == torch.float64
        assert_tied(model)

    @pytest.mark.parametrize("replacing", [False, True])
    def test_what_has_come_apart_is_not_made_one_in_passing(self, replacing):
        model = tie(tiny_model("llama", tie_word_embeddings=True), "two_way")
        trained = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
        model.lm_head.weight = trained
        model = self.convert(model, replacing)
        assert torch.equal(model.lm_head.weight, trained.double())
        assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        with pytest.raises(TyingError, match="lm_head.weight"):
            assert_tied(model)
