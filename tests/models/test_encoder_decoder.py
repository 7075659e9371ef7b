"""`TiedEncoderDecoderModel`: an encoder and a decoder put together, tied across the two by any scheme."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaConfig,
)

from hf_tying import TyingError, assert_tied, tie, tying_report
from hf_tying.config import SCHEMES
from hf_tying.data import train_byte_level_bpe
from hf_tying.models import TiedEncoderDecoderConfig, TiedEncoderDecoderModel

from ..forms import matrices
from ..processes import run_python
from ..tiny_translation import (
    JOINED,
    VOCAB,
    beams,
    nearly_equal,
    part_config,
    shake,
    translation_logits,
    translation_step,
)

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
PAIRS = [*JOINED, "roberta2gpt2", "bert2roberta"]
every_pair = pytest.mark.parametrize("pair", PAIRS)


def tied_config(pair: str = "bert2bert", scheme: str | None = "three_way", **changes) -> TiedEncoderDecoderConfig:
    encoder, decoder = pair.split("2", 1)
    ids = dict(pad_token_id=0, decoder_start_token_id=1, eos_token_id=2)
    tying = {"version": 1, "scheme": scheme} if scheme else None
    return TiedEncoderDecoderConfig.from_encoder_decoder_configs(
        part_config(encoder, False), part_config(decoder, True, **changes), tying=tying, **ids
    )


def tied_model(pair: str = "bert2bert", scheme: str = "three_way") -> TiedEncoderDecoderModel:
    torch.manual_seed(0)
    return shake(TiedEncoderDecoderModel(tied_config(pair, scheme)))


def saved_parts(folder: Path, pair: str = "bert2gpt2") -> tuple[str, str]:
    """An encoder and a decoder as somebody published them, each by itself."""
    torch.manual_seed(0)
    for name, family in zip(("encoder", "decoder"), pair.split("2", 1), strict=True):
        auto = AutoModel if name == "encoder" else AutoModelForCausalLM
        shake(auto.from_config(part_config(family, False))).save_pretrained(folder / name)
    return str(folder / "encoder"), str(folder / "decoder")


def together(model, scheme: str) -> bool:
    """Whether exactly the roles of `scheme` are one parameter."""
    held = matrices(model)
    members = set(SCHEMES[scheme])
    return all((held[a] is held[b]) == (a == b or {a, b} <= members) for a in held for b in held)


# --- made from configs -----------------------------------------------------------------------------------------------


@every_scheme
@every_pair
def test_a_model_from_a_config_is_tied_trains_and_loads_by_every_class(pair, scheme, tmp_path):
    model = tied_model(pair, scheme)
    assert together(model, scheme)
    assert_tied(model)
    translation_step(model)
    assert together(model, scheme)
    model.save_pretrained(tmp_path)
    for cls, expected in (
        (TiedEncoderDecoderModel, TiedEncoderDecoderModel),
        (AutoModelForSeq2SeqLM, TiedEncoderDecoderModel),
        (EncoderDecoderModel, EncoderDecoderModel),
    ):
        loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(loaded, expected) and not info["missing_keys"] and not info["unexpected_keys"]
        assert_tied(loaded)
        assert together(loaded, scheme)
        assert nearly_equal(translation_logits(loaded), translation_logits(model))
        assert torch.equal(beams(loaded), beams(model))


@every_pair
def test_beams_with_and_without_the_cache_agree(pair):
    model = tied_model(pair)
    assert torch.equal(beams(model, use_cache=True), beams(model, use_cache=False))


def test_the_auto_classes_give_ours_for_a_file_with_an_entry_and_the_stock_ones_for_any_other(tmp_path):
    tied_model().save_pretrained(tmp_path / "tied")
    stock = EncoderDecoderModel(EncoderDecoderConfig.from_dict(tied_config(scheme=None).to_dict()))
    stock.save_pretrained(tmp_path / "stock")
    assert type(AutoConfig.from_pretrained(tmp_path / "tied")) is TiedEncoderDecoderConfig
    assert type(AutoConfig.from_pretrained(tmp_path / "stock")) is EncoderDecoderConfig
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "stock")) is EncoderDecoderModel
    assert type(AutoModelForSeq2SeqLM.from_config(tied_config())) is TiedEncoderDecoderModel


@pytest.mark.parametrize("cls", [AutoModelForSeq2SeqLM, EncoderDecoderModel, TiedEncoderDecoderModel])
@pytest.mark.parametrize("made_by", ["the class", "tie"])
def test_a_name_in_the_file_that_no_parameter_has_is_refused_by_every_class(made_by, cls, tmp_path):
    model = tied_model()
    if made_by == "tie":
        model = EncoderDecoderModel(EncoderDecoderConfig.from_dict(tied_config(scheme=None).to_dict()))
        tie(model, "three_way", init_from="source")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"EncoderDecoderModel"' in text and "TiedEncoderDecoderModel" not in text
    wrong = text.replace("encoder.embeddings.word_embeddings.weight", "encoder.embeddings.word_embedding.weight")
    (tmp_path / "config.json").write_text(wrong)
    with pytest.raises(TyingError, match="word_embedding.weight.*nearest names"):
        cls.from_pretrained(tmp_path)


WAYS = ("without the package", "with the package")
CHILD = """
import sys
without, with_it, *folders = sys.argv[1:]
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSeq2SeqLM, EncoderDecoderModel
torch.set_num_threads(1)
from tests.tiny_translation import beams, translation_logits


def read_all(out):
    values = {}
    for i, folder in enumerate(folders):
        for name, cls in (("auto", AutoModelForSeq2SeqLM), ("stock", EncoderDecoderModel)):
            model = cls.from_pretrained(folder)
            values[f"{i}.{name}.logits"], values[f"{i}.{name}.beams"] = translation_logits(model), beams(model)
            if "hf_tying" in sys.modules:
                assert_tied(model)
    save_file(values, out)


read_all(without)
assert "hf_tying" not in sys.modules
from hf_tying import assert_tied
read_all(with_it)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> tuple[list[TiedEncoderDecoderModel], dict]:
    """Two trained models, and by way the file of what another process makes of theirs."""
    models = [tied_model(pair) for pair in ("bert2bert", "bert2gpt2")]
    folder = tmp_path_factory.mktemp("elsewhere")
    for i, model in enumerate(models):
        translation_step(model)
        model.save_pretrained(folder / str(i))
    files = {way: folder / f"{way}.safetensors" for way in WAYS}
    run_python("-c", CHILD, *files.values(), *(folder / str(i) for i in range(len(models))))
    return models, files


@pytest.mark.parametrize("way", WAYS)
def test_a_fresh_process_reads_the_same_model(way, elsewhere):
    models, files = elsewhere
    values = load_file(files[way])
    for i, model in enumerate(models):
        for name in ("auto", "stock"):
            assert nearly_equal(values[f"{i}.{name}.logits"], translation_logits(model))
            assert torch.equal(values[f"{i}.{name}.beams"], beams(model))


@pytest.mark.parametrize("first", ["AutoConfig", "AutoModelForSeq2SeqLM"])
def test_whatever_is_imported_first_the_auto_classes_know_ours(first, tmp_path):
    tied_model().save_pretrained(tmp_path)
    program = (
        f"import hf_tying; from transformers import {first}"
        "; from transformers import AutoConfig, AutoModelForSeq2SeqLM"
        f"; path = {str(tmp_path)!r}"
        "; print(type(AutoConfig.from_pretrained(path)).__name__)"
        "; print(type(AutoModelForSeq2SeqLM.from_pretrained(path)).__name__)"
    )
    printed = run_python("-c", program).stdout
    assert printed.split() == ["TiedEncoderDecoderConfig", "TiedEncoderDecoderModel"]


# --- put together from trained models --------------------------------------------------------------------------------


@every_scheme
def test_two_published_models_are_put_together_and_tied(scheme, tmp_path):
    parts = saved_parts(tmp_path)
    encoder = AutoModel.from_pretrained(parts[0]).get_input_embeddings().weight
    decoder = AutoModelForCausalLM.from_pretrained(parts[1]).get_input_embeddings().weight
    both = "source" in SCHEMES[scheme]
    model = TiedEncoderDecoderModel.from_encoder_decoder_pretrained(
        *parts, tying={"version": 1, "scheme": scheme}, init_from="target" if both else None
    )
    assert type(model) is TiedEncoderDecoderModel and together(model, scheme)
    assert torch.equal(matrices(model)["target"], decoder)
    assert torch.equal(matrices(model)["source"], decoder if both else encoder)
    assert_tied(model)
    assert model.config.tying["scheme"] == scheme
    assert model.config.decoder.add_cross_attention and model.config.decoder.is_decoder


def test_one_model_in_both_places_needs_no_choice_of_values(tmp_path):
    folder, _ = saved_parts(tmp_path, "bert2bert")
    model = TiedEncoderDecoderModel.from_encoder_decoder_pretrained(folder, folder, tying="three_way")
    assert together(model, "three_way")


def test_whose_values_to_take_is_never_guessed(tmp_path):
    parts = saved_parts(tmp_path)
    with pytest.raises(TyingError, match="init_from="):
        TiedEncoderDecoderModel.from_encoder_decoder_pretrained(*parts, tying="three_way")
    encoder = AutoModel.from_pretrained(parts[0])
    decoder = AutoModelForCausalLM.from_pretrained(parts[1], config=part_config("gpt2", True))
    config = tied_config("bert2gpt2")
    with pytest.raises(TyingError, match="init_from="):
        TiedEncoderDecoderModel(config, encoder, decoder)
    model = TiedEncoderDecoderModel(tied_config("bert2gpt2"), encoder, decoder, init_from="source")
    assert together(model, "three_way")
    assert model.get_input_embeddings().weight is encoder.get_input_embeddings().weight


def test_a_stock_model_with_an_entry_drops_no_trained_matrix_either(tmp_path):
    parts = saved_parts(tmp_path)
    entry = {"version": 1, "scheme": "three_way"}
    with pytest.raises(TyingError, match="both were loaded with values of their own .*init_from="):
        EncoderDecoderModel.from_encoder_decoder_pretrained(*parts, tying=entry)
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(parts[0], parts[0], tying=entry)
    assert together(model, "three_way")
    # Of a loaded and a new one, the loaded one is kept, on whichever side it is.
    fresh, loaded = AutoModel.from_config(part_config("bert", False)), AutoModelForCausalLM.from_pretrained(parts[1])
    trained = loaded.get_input_embeddings().weight.detach().clone()
    config = EncoderDecoderConfig.from_encoder_decoder_configs(fresh.config, loaded.config, tying=entry)
    model = EncoderDecoderModel(config, fresh, loaded)
    assert together(model, "three_way") and torch.equal(model.get_input_embeddings().weight, trained)


def test_without_a_word_about_ties_it_is_the_stock_model(tmp_path):
    model = TiedEncoderDecoderModel.from_encoder_decoder_pretrained(*saved_parts(tmp_path))
    assert together(model, "two_way")  # what GPT-2 ties by itself


def test_the_tokenizers_saved_with_the_models_are_compared(tmp_path):
    parts = saved_parts(tmp_path)
    texts = {"encoder": ["a dog runs and a cat sleeps"] * 3, "decoder": ["ein Hund rennt"] * 3}
    for name, text in texts.items():
        train_byte_level_bpe(text, 270).save_pretrained(tmp_path / name)
    with pytest.raises(TyingError, match="different vocabularies"):
        TiedEncoderDecoderModel.from_encoder_decoder_pretrained(*parts, tying="three_way", init_from="target")
    TiedEncoderDecoderModel.from_encoder_decoder_pretrained(*parts, tying="two_way")
    train_byte_level_bpe(texts["encoder"], 270).save_pretrained(tmp_path / "decoder")
    TiedEncoderDecoderModel.from_encoder_decoder_pretrained(*parts, tying="three_way", init_from="target")


# --- life ------------------------------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("count, padding", [(VOCAB + 6, None), (VOCAB - 8, None), (VOCAB + 1, 8)])
def test_it_resizes_where_the_stock_class_refuses(scheme, count, padding, tmp_path):
    model = tied_model("bert2bert", scheme)
    before = {role: p.detach().clone() for role, p in matrices(model).items()}
    embeddings = model.resize_token_embeddings(count, pad_to_multiple_of=padding)
    rows = count if padding is None else 72
    assert embeddings is model.get_input_embeddings() and embeddings.num_embeddings == rows
    kept = min(VOCAB, rows)
    for role, matrix in matrices(model).items():
        assert matrix.shape[0] == rows and torch.equal(matrix[:kept], before[role][:kept])
    assert model.get_output_embeddings().bias.shape == (rows,)
    assert (model.config.encoder.vocab_size, model.config.decoder.vocab_size) == (rows, rows)
    translation_step(model)
    model.save_pretrained(tmp_path)
    loaded = TiedEncoderDecoderModel.from_pretrained(tmp_path)
    assert together(loaded, scheme)
    assert nearly_equal(translation_logits(loaded), translation_logits(model))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "double", "state dict"])
def test_copies_and_conversions_stay_tied(how):
    model = tied_model("bert2gpt2")
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif how == "double":
        model = model.double()
    else:
        state, model = model.state_dict(), tied_model("bert2gpt2")
        model.load_state_dict(state, assign=True)
    assert type(model) is TiedEncoderDecoderModel and together(model, "three_way")
    assert_tied(model)


def test_positions_bias_and_padding_stay_each_sides_own():
    model = tied_model()
    positions = "embeddings.position_embeddings.weight"
    assert model.get_parameter(f"encoder.{positions}") is not model.get_parameter(f"decoder.bert.{positions}")
    assert model.get_output_embeddings().bias is not None
    assert model.encoder.get_input_embeddings() is not model.decoder.get_input_embeddings()
    gpt2 = tied_model("bert2gpt2")
    assert gpt2.encoder.get_input_embeddings().padding_idx == 0
    assert gpt2.decoder.get_input_embeddings().padding_idx is None


def test_the_report_names_all_three_roles(tmp_path):
    model = tied_model()
    model.save_pretrained(tmp_path)
    for report in (tying_report(model), tying_report(tmp_path)):
        group = next(group for group in report.groups if len(group.names) == 3)
        assert group.names[0] == "encoder.embeddings.word_embeddings.weight"


def test_tie_changes_the_scheme_of_a_live_model_and_the_class_stays(tmp_path):
    model = tied_model()
    tie(model, "two_way")
    assert type(model) is TiedEncoderDecoderModel and together(model, "two_way")
    translation_step(model)
    model.save_pretrained(tmp_path)
    assert together(AutoModelForSeq2SeqLM.from_pretrained(tmp_path), "two_way")


def test_publishing_needs_no_code(tmp_path):
    try:
        TiedEncoderDecoderModel.register_for_auto_class()
        tied_model().save_pretrained(tmp_path)
    finally:
        TiedEncoderDecoderModel._auto_class = None
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in (tmp_path / "config.json").read_text()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["source_target", "three_way"])
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(hidden_size=32), "expected one hidden_size .* found 16 .bert. and 32 .bert.: .*two_way"),
        (dict(vocab=80), "expected one vocab_size .* found 64 .bert. and 80 .bert.: .*join_vocabularies"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_a_weight_is_made(scheme, changes, message, tmp_path):
    with pytest.raises(TyingError, match=message):
        TiedEncoderDecoderModel(tied_config("bert2bert", scheme, **changes))
    TiedEncoderDecoderModel(tied_config("bert2bert", "two_way", **changes))
    encoder, _ = saved_parts(tmp_path)
    AutoModelForCausalLM.from_config(part_config("bert", False, **changes)).save_pretrained(tmp_path / "other")
    with pytest.raises(TyingError, match=message):
        TiedEncoderDecoderModel.from_encoder_decoder_pretrained(encoder, tmp_path / "other", tying=scheme)


def test_a_decoder_without_cross_attention_is_refused():
    encoder = AutoModel.from_config(part_config("bert", False))
    plain = AutoModelForCausalLM.from_config(part_config("gpt2", False))
    with pytest.raises(
        TyingError, match="GPT2LMHeadModel. has no cross-attention: expected .*add_cross_attention=True"
    ):
        TiedEncoderDecoderModel(encoder=encoder, decoder=plain)
    llama = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises((TyingError, ValueError), match="decoder"):
        TiedEncoderDecoderModel(TiedEncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, llama))


def test_an_unknown_scheme_is_refused_in_every_form(tmp_path):
    with pytest.raises(TyingError, match="three-way.*three_way"):
        tied_config(scheme="three-way")
    with pytest.raises(TyingError, match="three-way.*three_way"):
        TiedEncoderDecoderModel.from_encoder_decoder_pretrained(*saved_parts(tmp_path), tying="three-way")
