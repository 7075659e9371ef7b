"""f07 to f09, f12, f14, f20, f22: copies, state dicts, conversions, resizes, graphs and changes of one side."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaForCausalLM

from hf_tying import TyingError, assert_tied, gap, names_of, share_layers, tie, untie
from hf_tying.ties.relaxation import value_at
from hf_tying.training import average_into

from ..engines import different
from ..forms import class_form
from ..tiny import logits, tiny_inputs, without_dropout
from .kinds import LOW_RANK, PAIRS, RELAXED, made, names_in, plain


def step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(**tiny_inputs(model)).loss.backward()
    optimizer.step()


def clones(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def count(model):
    return len([*model.parameters()])


class TestCopies:
    """f07, f22: the classes of a relaxed place and of a layer with a factor are made on the fly."""

    @pytest.mark.parametrize(
        "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
    )
    def test_a_copy_computes_the_same_by_parameters_of_its_own(self, model, twin):
        other = twin(model)
        assert_tied(other)
        assert torch.equal(logits(other), logits(model)) and gap(other) == gap(model) and count(other) == count(model)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}

    def test_a_whole_model_is_saved_by_torch(self, model, tmp_path):
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert_tied(loaded)
        assert torch.equal(logits(loaded), logits(model))

    def test_a_class_over_the_mixin_is_made_from_the_entry(self, model, tmp_path):
        cls = class_form(LlamaForCausalLM)
        fields = model.config.to_dict()
        del fields["model_type"]
        made_tied = cls(cls.config_class(**fields))
        made_tied.load_state_dict(model.state_dict())
        assert_tied(made_tied)
        made_tied.save_pretrained(tmp_path)
        for each in (made_tied.eval(), copy.deepcopy(made_tied), cls.from_pretrained(tmp_path)):
            assert_tied(each)
            assert torch.equal(logits(each), logits(model)) and gap(each) == gap(model)


class TestStateDicts:
    """f07, f08."""

    @pytest.mark.parametrize("assign", [False, True])
    def test_what_one_model_has_another_gets(self, kind, model, assign):
        other = made(kind, seed=1)
        assert not torch.equal(logits(other), logits(model))
        other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
        assert_tied(other)
        assert torch.equal(logits(other), logits(model)) and gap(other) == gap(model)
        for each in (model, other):
            step(each)
        assert torch.equal(logits(other), logits(model)) and count(other) == count(model)

    @pytest.mark.parametrize("assign", [False, True])
    def test_conflicting_values_are_refused_and_nothing_is_loaded(self, kind, model, assign):
        before, state = logits(model), clones(model)
        state[names_in(kind)[1]] += 1
        state["model.norm.weight"] += 1
        with pytest.raises(TyingError, match=f"Cannot load this state dict.*{names_in(kind)[1]}"):
            model.load_state_dict(state, assign=assign)
        assert torch.equal(logits(model), before)

    def test_whole_values_of_a_file_are_those_of_the_differences(self, kind, model):
        state = clones(model)
        state[names_in(kind)[1]] = value_at(model, names_in(kind)[1]).detach().clone()
        other = made(kind, seed=1)
        other.load_state_dict(state)
        assert torch.equal(logits(other), logits(model))

    def test_names_that_are_missing_are_filled_from_those_that_are_there(self, kind, model):
        root, member = names_in(kind)
        state = clones(model)
        del state[member]
        other = made(kind, seed=1)
        other.load_state_dict(state)
        assert torch.equal(logits(other), logits(model))
        state = clones(model)
        del state[root]
        if kind in RELAXED:
            with pytest.raises(TyingError, match="is relaxed, and its root"):
                other.load_state_dict(state)
        else:
            other.load_state_dict(state)

    def test_a_state_dict_is_saved_as_the_model_that_has_it(self, kind, model, tmp_path):
        """An average of the weights, say."""
        state = {name: 1.5 * value for name, value in clones(model).items()}
        model.save_pretrained(tmp_path, state_dict=state)
        other = made(kind)
        other.load_state_dict(state)
        assert torch.equal(logits(type(plain()).from_pretrained(tmp_path)), logits(other))

    def test_a_model_goes_to_the_meta_device_and_comes_back(self, model):
        """f08."""
        state, held = clones(model), count(model)
        model.to("meta")
        assert_tied(model)
        assert count(model) == held and all(parameter.is_meta for parameter in model.parameters())
        model.to_empty(device="cpu").load_state_dict(state)
        assert_tied(model)
        assert count(model) == held
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("replacing", [False, True])
def test_a_conversion_keeps_one_parameter(model, replacing):
    """f09: also where torch puts a new parameter into each place."""
    expected, held = logits(model), count(model)
    torch.__future__.set_overwrite_module_params_on_conversion(replacing)
    try:
        for dtype in (torch.float64, torch.bfloat16):
            model.to(dtype)
            assert_tied(model)
            assert {parameter.dtype for parameter in model.parameters()} == {dtype} and count(model) == held
            torch.testing.assert_close(logits(model), expected, atol=0.3, rtol=0.1)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


class TestTheVocabularyChanges:
    """f12."""

    def test_a_resize_changes_no_word_that_stays(self, kind, model, tmp_path):
        before = logits(model)
        for size in (80, 64):
            model.resize_token_embeddings(size)
            assert_tied(model)
            torch.testing.assert_close(logits(model)[..., :64], before, atol=1e-5, rtol=1e-5)
            assert value_at(model, "lm_head.weight").shape[0] == size
            model.save_pretrained(tmp_path)
            assert torch.equal(logits(type(plain()).from_pretrained(tmp_path)), logits(model))

    @pytest.mark.parametrize("rows", [64, 70])
    def test_a_new_embedding_is_the_matrix_under_every_name(self, kind, model, rows):
        new = nn.Embedding(rows, 16)
        model.set_input_embeddings(new)
        assert_tied(model)
        assert model.get_input_embeddings() is new
        if kind == "relaxed pair":
            difference = value_at(model, "lm_head.weight") - new.weight
            assert difference.shape == (rows, 16) and difference[:64].abs().max() > 0
            assert model(torch.tensor([[3]])).logits.shape[-1] == rows

    @pytest.mark.parametrize("root", [0, 1], ids=["head relaxed", "embedding relaxed"])
    def test_a_relaxed_embedding_is_not_replaced_with_its_difference_lost(self, root):
        names = [PAIRS["llama"][root], PAIRS["llama"][1 - root]]
        model = different(tie(plain(), {"pair": {"names": names, "relax": LOW_RANK}}, init_from=names[0]))
        before = logits(model)
        with pytest.raises(TyingError, match="is relaxed.*harden"):
            if root:
                model.set_input_embeddings(nn.Embedding(64, 16))
            else:
                model.set_output_embeddings(nn.Linear(16, 64, bias=False))
        assert torch.equal(logits(model), before)
        untie(model).set_input_embeddings(nn.Embedding(64, 16))


class TestGraphs:
    """f14: of one model with everything: shared layers with differences and factors, and a relaxed pair."""

    IDS = torch.arange(3, 9)[None]

    @pytest.fixture
    def whole(self):
        model = share_layers(plain(num_hidden_layers=2), order=[0, 0], relax=LOW_RANK, residual_factor=0.5)
        pair = [*PAIRS["llama"]]
        return without_dropout(
            different(tie(model, {"pair": {"names": pair, "relax": {"kind": "scale"}}}, init_from=pair[0]))
        )

    def gradients(self, model, forward=None):
        model.zero_grad()
        (model if forward is None else forward)(input_ids=self.IDS, labels=self.IDS, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    def test_a_compiled_model_has_the_same_gradients_in_one_graph(self, whole):
        expected = self.gradients(whole)
        found = self.gradients(whole, torch.compile(whole, backend="aot_eager", fullgraph=True))
        assert_tied(whole)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=name)
            assert gradient.any(), name

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing_computes_the_same_gradients(self, whole, reentrant):
        expected = self.gradients(whole)
        whole.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for name, gradient in self.gradients(whole).items():
            torch.testing.assert_close(gradient, expected[name], msg=name)

    def test_functional_call_replaces_the_root_for_every_visit(self, whole):
        root = "model.layers.0.mlp.up_proj.weight"
        twice = {root: 2 * whole.state_dict()[root]}
        found = torch.func.functional_call(whole, twice, kwargs={"input_ids": self.IDS}).logits
        assert_tied(whole)
        with torch.no_grad():
            whole.state_dict()[root].mul_(2)
        assert torch.equal(found, whole(input_ids=self.IDS).logits)

    def test_it_is_exported(self, whole):
        program = torch.export.export(whole.eval(), (self.IDS,), kwargs={"use_cache": False}, strict=False)
        found = program.module()(self.IDS, use_cache=False).logits
        torch.testing.assert_close(found, whole(input_ids=self.IDS).logits)


class TestOneSideIsChanged:
    """f20."""

    def test_an_average_of_torch_moves_each_parameter_once(self, model):
        average, start = AveragedModel(model), clones(model)
        average.update_parameters(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        average.update_parameters(model)
        assert_tied(average)
        for name, value in average.module.state_dict().items():
            torch.testing.assert_close(value, start[name] + 0.5)

    def test_average_into_moves_each_parameter_once(self, model):
        average, start = copy.deepcopy(model), clones(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        average_into(average, model, 0.9)
        for name, value in average.state_dict().items():
            torch.testing.assert_close(value, start[name] + 0.1)

    def test_a_parameter_has_the_names_of_all_its_places(self, kind, model):
        root, member = names_in(kind)
        assert names_of(model, model.get_parameter(root)) == [root, member]

    @pytest.mark.parametrize("change", [lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
                                        parametrizations.weight_norm], ids=["pruning", "weight norm"])  # fmt: skip
    def test_what_takes_a_member_over_is_told(self, kind, change, tmp_path):
        member = names_in(kind)[1].removesuffix(".weight")
        model = made(kind)
        if kind in RELAXED:  # a computed matrix is none that torch can take over, as torch says
            with pytest.raises((TypeError, AssertionError), match="weight"):
                change(model.get_submodule(member))
            model = untie(made(kind))
            change(model.get_submodule(member))
            assert_tied(model)
            return
        change(model.get_submodule(member))
        training = lambda m: m.train()(**tiny_inputs(m))  # noqa: E731
        for use in (assert_tied, lambda m: m.save_pretrained(tmp_path / "out"), training):
            with pytest.raises(TyingError, match=member):
                use(model)
        assert not (tmp_path / "out").exists()
