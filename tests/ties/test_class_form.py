"""A class over the mixin gives the same model and the same file as `tie` does."""

import pytest
import torch

from hf_tying import TyingConfig, assert_tied, tie

from ..forms import class_form
from ..tiny import FULL_SCHEME, logits, shared_names, tiny_config, tiny_model
from .helpers import FORMATS, by_name

# Both an embedding and a head over it; one whose softmax has a bias tied of its own; encoder-decoders with a carrier.
CLASS_FORMS = ["llama", "gpt2", "bert", "bart", "t5"]


@pytest.mark.parametrize("save_format", FORMATS)
@pytest.mark.parametrize("arch", CLASS_FORMS)
def test_the_class_form_gives_the_same_model_and_the_same_file_as_tie(arch, save_format, tmp_path):
    in_place = tiny_model(arch, tie_word_embeddings=True)
    cls = class_form(type(in_place))
    tie(in_place, TyingConfig(scheme=FULL_SCHEME[arch], save_format=save_format))
    fields = tiny_config(arch).to_dict()
    fields |= {"tie_word_embeddings": in_place.config.tie_word_embeddings, "dtype": in_place.config.dtype}
    entry = {"version": 1, "scheme": FULL_SCHEME[arch], "save_format": save_format}
    declared = cls(cls.config_class(**{k: v for k, v in fields.items() if k != "model_type"}, tying=entry)).eval()
    assert_tied(declared)
    declared.load_state_dict(in_place.state_dict())
    assert_tied(declared)

    assert by_name(declared) == by_name(in_place) and declared.config.tying == in_place.config.tying
    assert list(declared.state_dict()) == list(in_place.state_dict())
    for name, value in in_place.state_dict().items():
        assert torch.equal(declared.state_dict()[name], value)
    assert torch.equal(logits(declared), logits(in_place))

    in_place.save_pretrained(tmp_path / "in place")
    declared.save_pretrained(tmp_path / "class form")
    reloaded = cls.from_pretrained(tmp_path / "class form").eval()
    assert_tied(reloaded)
    assert reloaded.tie_groups == declared.tie_groups and torch.equal(logits(reloaded), logits(in_place))
    files = [(tmp_path / form / "model.safetensors").read_bytes() for form in ("in place", "class form")]
    assert files[0] == files[1]
    # The weights of one form open in the other.
    assert torch.equal(logits(cls.from_pretrained(tmp_path / "in place").eval()), logits(in_place))


@pytest.mark.parametrize("arch", CLASS_FORMS)
def test_a_class_form_model_without_an_entry_is_tied_as_its_class_declares(arch, tmp_path):
    stock = tiny_model(arch, tie_word_embeddings=True)
    cls = class_form(type(stock))
    fields = {k: v for k, v in stock.config.to_dict().items() if k != "model_type"}
    declared = cls(cls.config_class(**fields))
    assert_tied(declared)
    assert {frozenset(group.names) for group in declared.tie_groups} == set(map(frozenset, shared_names(stock)))
    assert declared.config.tying["scheme"] == FULL_SCHEME[arch]
