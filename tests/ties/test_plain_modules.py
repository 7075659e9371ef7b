"""What is not a `PreTrainedModel` is refused with a way out, and each way out is walked."""

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_tying import (
    TyingCallback,
    TyingError,
    assert_tied,
    load_tied,
    merge_projection,
    names_of,
    save_tied,
    tie,
    tying_report,
    untie,
    use_projection,
    use_tied_loss,
)
from hf_tying.data import join_vocabularies
from hf_tying.diagnostics import diagnose
from hf_tying.losses import tied_cross_entropy, tied_embedding

from ..tiny import tiny_model

ACTS = {
    "use_tied_loss": use_tied_loss,
    "use_projection": use_projection,
    "merge_projection": merge_projection,
    "callback": lambda model: TyingCallback().on_train_begin(None, None, None, model=model),
    "join_vocabularies": lambda model: join_vocabularies(model, None, None),
    "diagnose": diagnose,
}
#: These take a plain module, and refuse one that holds a model, or what is no module.
TIES = {
    "tie": lambda model: tie(model, "two_way"),
    "untie": untie,
    "assert_tied": assert_tied,
    "tying_report": tying_report,
    "save_tied": lambda model: save_tied(model, "never_written"),
    "load_tied": lambda model: load_tied(model, "never_read"),
}
#: These say what they need of a model, which a plain module and a wrapper lack alike.
OF_A_HEAD = ("use_projection", "merge_projection")


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)

    def forward(self, ids):
        return self.head(self.embedding(ids))


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = tiny_model("gpt2")


class Config(PreTrainedConfig):
    model_type = "plain_module_of_a_test"
    tie_word_embeddings: bool = False


class Derived(PreTrainedModel, Plain):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("act", ACTS)
def test_a_plain_module_is_refused_with_what_to_do(act):
    module = Plain()
    before = dict(module.named_parameters())
    expected = (
        "Plain" if act in OF_A_HEAD else "a Plain: expected a transformers PreTrainedModel. A plain nn.Module has"
    )
    with pytest.raises(TyingError, match=expected):
        ACTS[act](module)
    assert dict(module.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in module.named_parameters())


@pytest.mark.parametrize("act", [act for act in ACTS | TIES if act not in OF_A_HEAD])
def test_a_module_that_holds_a_model_is_told_which(act):
    with pytest.raises(TyingError, match=r"a Holder: .* holds 'decoder' \(GPT2LMHeadModel\): give that one"):
        (ACTS | TIES)[act](Holder())


@pytest.mark.parametrize("act", ACTS | TIES)
def test_what_is_no_module_is_refused(act):
    with pytest.raises(TyingError, match="int"):
        (ACTS | TIES)[act](3)


def test_a_tie_by_hand_is_kept_by_safetensors(tmp_path):
    module, again = Plain(), Plain()
    module.head.weight = module.embedding.weight
    save_model(module, tmp_path / "model.safetensors")
    again.head.weight = again.embedding.weight
    load_model(again, tmp_path / "model.safetensors")
    assert torch.equal(again.head.weight, module.embedding.weight)
    assert names_of(again, again.head.weight) == ["embedding.weight", "head.weight"]


def test_the_model_inside_is_tied():
    holder = Holder()
    tie(holder.decoder, "two_way", init_from="target")
    assert holder.decoder.lm_head.weight is holder.decoder.transformer.wte.weight


@pytest.mark.parametrize("ties", ["two_way", ["embedding.weight", "head.weight"]], ids=str)
def test_a_class_derived_from_the_module_is_tied_saved_and_loaded(ties, tmp_path):
    model = tie(Derived(Config()), ties, init_from="mean")
    model.save_pretrained(tmp_path)
    again = Derived.from_pretrained(tmp_path)
    assert_tied(again)
    assert again.head.weight is again.embedding.weight
    ids = torch.arange(5)[None]
    assert torch.equal(again(ids), model(ids))


def test_the_losses_take_the_tensors_of_any_module():
    module, ids = Plain(), torch.arange(6)[None]
    hidden = tied_embedding(ids, module.embedding.weight)
    loss = tied_cross_entropy(hidden, module.embedding.weight, ids)
    expected = nn.functional.cross_entropy((hidden @ module.embedding.weight.T).flatten(0, 1), ids.flatten())
    assert torch.allclose(loss, expected)


def test_a_parameter_without_a_shape_is_refused():
    module = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(4))
    with pytest.raises(TyingError, match="has no shape yet .*Call the module once"):
        tie(module, ["0.weight", "1.weight"])
