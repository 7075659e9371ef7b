"""Any parameters are tied in any number of groups, alone or beside the embeddings, and stay so in files."""

import pytest
import torch

from hf_tying import TyingConfig, TyingError, assert_tied, tie, untie

from ..tiny import FULL_SCHEME, VOCAB, layer_pair, logits, shared_names, split, tiny_model, untied_model
from .helpers import FORMATS, by_name, every_architecture, keys_in, load, step, tied


@pytest.mark.parametrize("embeddings", ["free embeddings", "tied embeddings"])
@every_architecture
def test_layers_are_tied_alone_or_beside_the_embeddings_and_stay_so(arch, embeddings, tmp_path):
    model = untied_model(arch)
    pair = layer_pair(model)
    tie(model, {"layers": pair}, init_from="mean")
    if embeddings == "tied embeddings":
        tie(model, TyingConfig(scheme=FULL_SCHEME[arch], groups={"layers": pair}), init_from="target")
    shared = shared_names(model)
    assert sorted(pair) in [sorted(names) for names in shared]
    assert len(shared) == len(model.tie_groups) == (2 if embeddings == "tied embeddings" else 1)
    step(model)
    model.save_pretrained(tmp_path / "tied")
    loaded = load(arch, tmp_path / "tied")
    assert_tied(loaded)
    assert shared_names(loaded) == shared and by_name(loaded) == by_name(model)
    assert torch.equal(logits(loaded), logits(model))
    if arch != "t5":  # its config class answers True whatever it is told
        assert loaded.config.get_text_config().tie_word_embeddings is (embeddings == "tied embeddings")
    untie(loaded, pair)
    assert pair not in shared_names(loaded)
    loaded.save_pretrained(tmp_path / "untied")
    assert len(shared_names(load(arch, tmp_path / "untied"))) == len(shared) - 1


@pytest.mark.parametrize(
    "rows, multiple", [(VOCAB + 6, None), (VOCAB - 2, None), (VOCAB + 6, 8)], ids=["up", "down", "padded"]
)
@every_architecture
def test_a_resize_of_free_embeddings_makes_no_tie_that_nobody_declared(arch, rows, multiple, tmp_path):
    model = untied_model(arch)
    tie(model, layer_pair(model), init_from="mean")
    before = shared_names(model)
    model.resize_token_embeddings(rows, pad_to_multiple_of=multiple, mean_resizing=False)
    assert model.get_output_embeddings().weight.shape[0] == (rows if multiple is None else VOCAB + 8)
    assert shared_names(model) == before
    assert_tied(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(arch, tmp_path)), logits(model))


@pytest.mark.parametrize("rows", [VOCAB + 6, VOCAB - 2])
@every_architecture
def test_an_untied_model_is_resized_and_reloads_with_what_untie_leaves_tied(arch, rows, tmp_path):
    model = untie(tiny_model(arch, tie_word_embeddings=True))
    before = shared_names(model)  # BERT's output bias, BART's carrier
    model.resize_token_embeddings(rows, mean_resizing=False)
    assert shared_names(model) == before
    assert_tied(model)
    model.save_pretrained(tmp_path)
    loaded = load(arch, tmp_path)
    assert shared_names(loaded) == before and torch.equal(logits(loaded), logits(model))


def test_every_name_of_a_group_can_be_its_root(tmp_path):
    expected = None
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    for root in names:
        for save_format in FORMATS:
            group = [root, *(name for name in names if name != root)]
            config = TyingConfig(groups={"embeddings": group}, save_format=save_format)
            model = tie(untied_model("llama"), config, init_from="target")
            model.save_pretrained(tmp_path)
            assert model.tie_groups[0].root == root and root in keys_in(tmp_path)
            loaded = load("llama", tmp_path)
            assert_tied(loaded)
            expected = logits(loaded) if expected is None else expected
            assert loaded.tie_groups[0].root == root and torch.equal(logits(loaded), expected)


def test_the_name_of_a_module_stands_for_all_its_parameters(tmp_path):
    model = tie(untied_model("opt"), ["model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1"], init_from="mean")
    pairs = [[f"model.decoder.layers.{i}.fc1.{part}" for i in (0, 1)] for part in ("weight", "bias")]
    assert sorted(shared_names(model)) == sorted(pairs)
    model.save_pretrained(tmp_path)
    loaded = load("opt", tmp_path)
    assert sorted(shared_names(loaded)) == sorted(pairs)
    assert torch.equal(logits(loaded), logits(model))


def test_many_groups_live_side_by_side(tmp_path):
    model = untied_model("llama")
    projections = ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"]
    groups = {part: [f"model.layers.{i}.{part}.weight" for i in (1, 0)] for part in projections}
    tie(model, groups | {"softmax": ["lm_head.weight", "model.embed_tokens.weight"]}, init_from="mean")
    assert {group.name: list(group.names) for group in model.tie_groups} == model.config.tying["groups"]
    assert {group.name for group in model.tie_groups} == {*groups, "softmax"}
    step(model)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    loaded = load("llama", tmp_path)
    assert_tied(loaded)
    assert by_name(loaded) == by_name(model) and torch.equal(logits(loaded), logits(model))


def test_a_tie_made_by_hand_is_named_before_it_is_lost_in_a_file(tmp_path):
    model = tied("llama")
    first, second = layer_pair(model)
    path, _, attribute = second.rpartition(".")
    setattr(model.get_submodule(path), attribute, model.get_parameter(first))
    with pytest.raises(TyingError, match="no group declares it"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    split(model, [second])
    model.save_pretrained(tmp_path)
