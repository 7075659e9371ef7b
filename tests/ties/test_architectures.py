"""Every architecture of the coverage list through a tied model's life: tie, train, files, other processes, untie."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    FSMTConfig,
    FSMTForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
)
from transformers.core_model_loading import revert_weight_conversion

from hf_tying import TiedModelMixin, TyingConfig, TyingError, assert_tied, tie, untie

from ..forms import class_form
from ..tiny import (
    ALL,
    AUTO,
    FULL_SCHEME,
    VOCAB,
    layer_pair,
    logits,
    shared_names,
    split,
    tiny_config,
    tiny_inputs,
    tiny_model,
    untied_model,
    untied_twin,
)

ROOT = Path(__file__).parents[2]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = ("dedup", "portable")
# Both an embedding and a head over it; one whose softmax has a bias tied of its own; encoder-decoders with a carrier.
CLASS_FORMS = ["llama", "gpt2", "bert", "bart", "t5"]

every_architecture = pytest.mark.parametrize("arch", ALL)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def tied(arch: str, dtype: str = "float32", save_format: str | None = None) -> PreTrainedModel:
    """The untied variant of `arch`, tied by `tie` as its own scheme says."""
    config = TyingConfig(scheme=FULL_SCHEME[arch], save_format=save_format)
    return tie(untied_model(arch, dtype=DTYPES[dtype]), config, init_from="target")


def step(model: PreTrainedModel, lr: float = 0.5) -> torch.Tensor:
    """One step of plain gradient descent, as any training loop takes it; the loss before it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss = model(**tiny_inputs(model)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def on_disk(model: PreTrainedModel, names) -> set[str]:
    """`names` as transformers spells them in files: GPT-NeoX, Mixtral and LLaVA keep older names there."""
    values = model.state_dict()
    return set(revert_weight_conversion(model, {name: values[name] for name in names})) - not_saved(model)


def not_saved(model: PreTrainedModel) -> set[str]:
    """Names that the architecture itself keeps out of its files (Marian's sinusoidal positions)."""
    return {name for name in model.state_dict() for key in model._keys_to_ignore_on_save or () if key == name}


def keys_in(folder) -> set[str]:
    """The names that a folder of weights holds, over all its shards."""
    keys: set[str] = set()
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            keys |= set(file.keys())
    return keys


def load(arch: str, folder, **kwargs) -> PreTrainedModel:
    """What a user calls, and nothing that the file should have given is missing from it."""
    model, info = AUTO[arch].from_pretrained(folder, output_loading_info=True, **kwargs)
    found = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    assert not found
    return model.eval()


def by_name(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """The groups; config.json keeps them sorted by name."""
    return {group.name: group.names for group in model.tie_groups}


def the_group(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of the one group that a tied model of the coverage list holds."""
    (group,) = model.tie_groups
    return group.names


# --- training --------------------------------------------------------------------------------------------------------


@every_dtype
@every_architecture
def test_the_gradient_of_a_tied_matrix_is_the_sum_of_an_untied_twins_gradients(arch, dtype):
    untied = untied_model(arch, dtype=DTYPES[dtype])
    model = tied(arch, dtype)
    names = the_group(model)
    assert shared_names(untied) == [] and shared_names(model) == [sorted(names, key=list(untied.state_dict()).index)]
    twin = untied_twin(model, untied)
    for each in (model, twin):
        each(**tiny_inputs(each)).loss.backward()
    theirs = dict(twin.named_parameters())
    parts = [p.grad.float() for name in names if (p := theirs[name]).grad is not None]
    assert len(parts) >= 2 and all(part.abs().max() > 0 for part in parts)
    expected = sum(parts)
    # In bfloat16 (8 bits) the tied gradient is rounded once more for each use that is added to it.
    tolerance = 1e-6 if dtype == "float32" else len(names) * 2**-8
    gap = (model.get_parameter(names[0]).grad.float() - expected).abs().max()
    assert gap <= tolerance * expected.abs().max()


@every_dtype
@every_architecture
def test_an_optimizer_step_moves_one_parameter_and_leaves_it_one(arch, dtype):
    model = tied(arch, dtype)
    names = the_group(model)
    before = model.get_parameter(names[0])
    values = before.detach().clone()
    assert sum(p is before for p in model.parameters()) == 1
    step(model)
    assert all(model.get_parameter(name) is before for name in names)
    assert not torch.equal(before, values)
    assert_tied(model)


# --- files, in this process ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_format", FORMATS)
@every_dtype
@every_architecture
def test_a_tied_model_lives_through_files_and_untie_and_tie_again(arch, dtype, save_format, tmp_path):
    model = tied(arch, dtype, save_format)
    step(model)
    expected, names, everything = logits(model), the_group(model), set(model.state_dict())
    model.save_pretrained(tmp_path / "tied")
    dropped = set(names[1:]) if save_format == "dedup" else set()
    assert keys_in(tmp_path / "tied") == on_disk(model, everything - dropped)

    loaded = load(arch, tmp_path / "tied")
    assert_tied(loaded)
    assert the_group(loaded) == names and len({id(loaded.get_parameter(name)) for name in names}) == 1
    assert loaded.config.tying == model.config.tying and loaded.dtype == DTYPES[dtype]
    assert torch.equal(logits(loaded), expected)

    untie(loaded, list(names))
    assert len({id(loaded.get_parameter(name)) for name in names}) == len(names)
    assert torch.equal(logits(loaded), expected)
    step(loaded)  # the matrices go their own ways
    apart = logits(loaded)
    loaded.save_pretrained(tmp_path / "untied")
    assert keys_in(tmp_path / "untied") == on_disk(loaded, everything)
    again = load(arch, tmp_path / "untied")
    assert shared_names(again) == [] and again.config.tying["groups"] == {} and again.config.tying["scheme"] == "none"
    assert torch.equal(logits(again), apart)
    with pytest.raises(TyingError, match="init_from"):
        tie(again, FULL_SCHEME[arch])
    assert torch.equal(logits(again), apart)

    tie(again, FULL_SCHEME[arch], init_from="target")
    again.save_pretrained(tmp_path / "again")
    final = load(arch, tmp_path / "again")
    assert_tied(final)
    assert set(the_group(final)) == set(names) and torch.equal(logits(final), logits(again))


@every_architecture
def test_shards_hold_what_one_file_holds(arch, tmp_path):
    for save_format in FORMATS:
        model = tied(arch, save_format=save_format)
        model.save_pretrained(tmp_path / save_format, max_shard_size="3KB")
        assert len(list((tmp_path / save_format).glob("*.safetensors"))) > 2
        dropped = set(the_group(model)[1:]) if save_format == "dedup" else set()
        assert keys_in(tmp_path / save_format) == on_disk(model, set(model.state_dict()) - dropped)
        loaded = load(arch, tmp_path / save_format)
        assert_tied(loaded)
        assert the_group(loaded) == the_group(model) and torch.equal(logits(loaded), logits(model))


# --- files, in other processes ---------------------------------------------------------------------------------------

WITHOUT, FIRST, LAST = "without the package", "package before transformers", "package after transformers"

# What a user's program does, for many folders at once. It is run in a fresh process.
CHILD = f"""
import json, pathlib, sys

way, work, out = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_tying":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


if way == {WITHOUT!r}:
    sys.meta_path.insert(0, Absent())
if way == {FIRST!r}:
    import hf_tying
    assert "torch" not in sys.modules
import torch, transformers.modeling_utils
from safetensors.torch import save_file
from transformers.utils import logging
torch.set_num_threads(1)
logging.disable_progress_bar()
logging.set_verbosity_error()
from tests.tiny import AUTO, logits, shared_names

assert ("hf_tying" in sys.modules) == (way == {FIRST!r})
if way == {LAST!r}:
    import hf_tying

found, values = {{}}, {{}}
for folder in sorted(work.iterdir()):
    arch = folder.name.split("_in_")[0]
    try:
        model, info = AUTO[arch].from_pretrained(folder, output_loading_info=True)
        models = {{folder.name: model.eval()}}
        found[folder.name] = {{"missing": sorted(info["missing_keys"]), "shared": shared_names(model)}}
        if way != {WITHOUT!r}:
            hf_tying.assert_tied(model)
            found[folder.name]["groups"] = {{group.name: group.names for group in model.tie_groups}}
            for whole in folder.glob("whole.*"):
                read = torch.load if whole.suffix == ".pt" else __import__("pickle").load
                with open(whole, "rb") as file:
                    model = read(file, **({{"weights_only": False}} if whole.suffix == ".pt" else {{}}))
                hf_tying.assert_tied(model)
                found[folder.name + whole.suffix] = {{"shared": shared_names(model)}}
                models[folder.name + whole.suffix] = model
        for name, model in models.items():
            values[name] = logits(model)
    except Exception as error:
        found[folder.name] = {{"error": f"{{type(error).__name__}}: {{error}}"}}
assert ("hf_tying" in sys.modules) == (way != {WITHOUT!r})
save_file(values, out / "logits.safetensors")
(out / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, worker_id):
    """Folders of every architecture, and what fresh processes make of them: folder of expected, folder by way."""
    # Workers share one set: the temporary folder above a worker's own is theirs together.
    base = tmp_path_factory.getbasetemp()
    base = (base if worker_id == "master" else base.parent) / "elsewhere"
    with FileLock(f"{base}.lock"):
        if not (base / "complete").exists():
            shutil.rmtree(base, ignore_errors=True)  # of a worker that failed in it
            write_folders(base / "work", base / "expected")
            running = []
            for way in (WITHOUT, FIRST, LAST):
                (base / way).mkdir()
                command = [sys.executable, "-c", CHILD, way, str(base / "work"), str(base / way)]
                environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
                running.append(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True))
            for done in running:
                assert done.returncode == 0, done.stderr
            (base / "complete").touch()
    return base


#: architecture, dtype, and what is tied how in the folder.
FOLDERS = [
    *((arch, dtype, kind) for arch in ALL for dtype in DTYPES for kind in (*FORMATS, "untied")),
    *((arch, "float32", "layers") for arch in ALL),
]


def write_folders(work: Path, expected: Path) -> None:
    expected.mkdir(parents=True)
    values, told, models = {}, {}, {}
    for arch, dtype, kind in FOLDERS:
        name, scheme = f"{arch}_in_{dtype}_{kind}", FULL_SCHEME[arch]
        if kind == "dedup":
            models[arch] = tied(arch, dtype)
            step(models[arch])
        model = models[arch]
        if kind in FORMATS:
            tie(model, TyingConfig(scheme=scheme, save_format=kind))
        elif kind == "untied":
            untie(model, list(the_group(model)))
            step(model)
        else:
            layers = {"layers": layer_pair(untied_model(arch))[::-1]}
            model = tie(untied_model(arch), TyingConfig(scheme=scheme, groups=layers), init_from="mean")
        model.save_pretrained(work / name)
        if kind == "portable" and dtype == "float32":
            torch.save(model, work / name / "whole.pt")
            (work / name / "whole.pickle").write_bytes(pickle.dumps(model))
        values[name] = logits(model)
        told[name] = {"shared": shared_names(model), "groups": by_name(model)}
    torch.save(values, expected / "logits.pt")
    (expected / "told.json").write_text(json.dumps(told))


@pytest.mark.parametrize("way", [WITHOUT, FIRST, LAST])
@pytest.mark.parametrize("folder", FOLDERS, ids="-".join)
def test_another_process_computes_the_same_logits(folder, way, elsewhere):
    name = "{}_in_{}_{}".format(*folder)
    found = json.loads((elsewhere / way / "found.json").read_text())[name]
    assert "error" not in found, found["error"]
    expected = torch.load(elsewhere / "expected" / "logits.pt")[name]
    told = json.loads((elsewhere / "expected" / "told.json").read_text())[name]
    assert torch.equal(load_file(elsewhere / way / "logits.safetensors")[name], expected)
    if way != WITHOUT:
        assert found == {"missing": [], **told}
        assert len(told["shared"]) == {"untied": 0, "layers": 2}.get(folder[2], 1)


@pytest.mark.parametrize("suffix", [".pt", ".pickle"])
@every_architecture
def test_a_whole_model_written_by_torch_save_or_pickle_is_tied_in_another_process(arch, suffix, elsewhere):
    name = f"{arch}_in_float32_portable"
    expected = torch.load(elsewhere / "expected" / "logits.pt")[name]
    shared = json.loads((elsewhere / "expected" / "told.json").read_text())[name]["shared"]
    for way in (FIRST, LAST):
        assert json.loads((elsewhere / way / "found.json").read_text())[name + suffix] == {"shared": shared}
        assert torch.equal(load_file(elsewhere / way / "logits.safetensors")[name + suffix], expected)


# --- copies ----------------------------------------------------------------------------------------------------------


@every_architecture
def test_copies_of_a_model_are_tied_in_themselves_and_to_nothing_else(arch, tmp_path):
    model = tied(arch)
    torch.save(model, tmp_path / "whole.pt")
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(tmp_path / "whole.pt", weights_only=False),
    }
    for other in copies.values():
        assert_tied(other)
        assert type(other) is type(model) and other.tie_groups == model.tie_groups
        assert shared_names(other) == shared_names(model)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        assert torch.equal(logits(other), logits(model))
        step(other)
        assert_tied(other)
        other.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(load(arch, tmp_path / "saved")), logits(other))


# --- the class form --------------------------------------------------------------------------------------------------


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


# --- encoder-decoders: every scheme, also where the architecture does not say its roles ------------------------------


def two_sides(**fields) -> dict:
    """`fields` for the encoder and for the decoder, whose names have `{}` for the side."""
    return {key.format(side): value for side in ("encoder", "decoder") for key, value in fields.items()}


def fsmt() -> PreTrainedModel:
    fields = {"src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB, "d_model": 16, "max_position_embeddings": 64}
    sides = two_sides(**{"{}_layers": 1, "{}_attention_heads": 2, "{}_ffn_dim": 32})
    return FSMTForConditionalGeneration(FSMTConfig(langs=["en", "de"], **fields, **sides))


def prophetnet() -> PreTrainedModel:
    fields = {"vocab_size": VOCAB, "hidden_size": 16, "max_position_embeddings": 64, "ngram": 2, "num_buckets": 8}
    sides = two_sides(**{"num_{}_layers": 1, "num_{}_attention_heads": 2, "{}_ffn_dim": 32})
    return ProphetNetForConditionalGeneration(ProphetNetConfig(**fields, **sides))


def two_berts() -> PreTrainedModel:
    berts = tiny_config("bert"), tiny_config("bert")
    return EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*berts))


SOURCE_TARGET_OUTPUT = {
    "t5": ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),
    "bart": ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"),
    "marian": ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"),
    "fsmt": ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "model.decoder.output_projection"),
    "prophetnet": ("prophetnet.encoder.word_embeddings", "prophetnet.decoder.word_embeddings", "lm_head"),
    "two berts": (
        "encoder.embeddings.word_embeddings", "decoder.bert.embeddings.word_embeddings",
        "decoder.cls.predictions.decoder",
    ),
}  # fmt: skip
MAKERS = {"fsmt": fsmt, "prophetnet": prophetnet, "two berts": two_berts}


@pytest.mark.parametrize("save_format", FORMATS)
@pytest.mark.parametrize("scheme", ["none", "two_way", "source_target", "three_way"])
@pytest.mark.parametrize("arch", SOURCE_TARGET_OUTPUT)
def test_an_encoder_decoder_is_tied_by_every_scheme_and_its_file_opens_with_and_without(
    arch, scheme, save_format, tmp_path
):
    torch.manual_seed(0)
    model = (MAKERS[arch]() if arch in MAKERS else untied_model(arch)).eval()
    stock = type(model)
    tie(model, TyingConfig(scheme=scheme, save_format=save_format), init_from="mean")
    assert_tied(model)
    matrices = [model.get_parameter(f"{name}.weight") for name in SOURCE_TARGET_OUTPUT[arch]]
    one = {"none": [], "two_way": [1, 2], "source_target": [0, 1], "three_way": [0, 1, 2]}[scheme]
    assert len({id(matrix) for matrix in matrices}) == 3 - max(len(one) - 1, 0)
    assert len({id(matrices[i]) for i in one}) <= 1
    # No matrix without a use is left beside the three: `shared` is one of them.
    vocabularies = [p for p in model.parameters() if p.shape == matrices[0].shape and p.requires_grad]
    positions = [p for n, p in model.named_parameters() if "position" in n and p.shape == matrices[0].shape]
    assert {id(p) for p in vocabularies} - {id(p) for p in positions} == {id(matrix) for matrix in matrices}

    model.save_pretrained(tmp_path)
    expected = translate(model)
    loaded, info = stock.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_tied(loaded)
    assert by_name(loaded) == by_name(model) and torch.equal(translate(loaded), expected)
    if save_format == "portable":  # a class that is told nothing of the entry
        config = json.loads((tmp_path / "config.json").read_text())
        del config["tying"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        plain = stock.from_pretrained(tmp_path)
        assert not hasattr(plain, "tie_groups") and torch.equal(translate(plain), expected)


def translate(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids, decoder_input_ids=ids.flip(1)).logits


# --- any parameters, several groups ----------------------------------------------------------------------------------


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


# --- base model and head model over one file -------------------------------------------------------------------------


@pytest.mark.parametrize("save_format", FORMATS)
@every_architecture
def test_the_base_model_reads_the_head_models_file_and_keeps_the_ties_inside_it(arch, save_format, tmp_path):
    model = untied_model(arch)
    pair = layer_pair(model)
    config = TyingConfig(scheme=FULL_SCHEME[arch], groups={"layers": pair}, save_format=save_format)
    tie(model, config, init_from="mean")
    model.save_pretrained(tmp_path / "head")
    base, info = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert_tied(base)
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    below = set(base.state_dict())
    # The file of the head model never had BERT's pooler, nor what Marian computes.
    absent = {n for n in below if "pooler" in n or "embed_positions" in n}
    assert info["missing_keys"] <= absent
    inside = [[n for name in names if (n := name.removeprefix(prefix)) in below] for names in shared_names(model)]
    assert [n.removeprefix(prefix) for n in pair] in inside
    assert shared_names(base) == [names for names in inside if len(names) > 1]
    values = model.state_dict()
    outer = {name: prefix + name if prefix + name in values else name for name in below}
    assert all(torch.equal(value, values[outer[n]]) for n, value in base.state_dict().items() if n not in absent)

    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert shared_names(again) == shared_names(base)
    head, info = AUTO[arch].from_pretrained(tmp_path / "base", output_loading_info=True)
    assert sorted(pair) in [sorted(names) for names in shared_names(head)]
    assert not set(outer.values()) & set(info["missing_keys"])


def test_the_base_model_inside_a_head_model_can_be_saved_by_itself(tmp_path):
    model = untied_model("llama")
    pair = layer_pair(model)
    tie(model, TyingConfig(scheme="two_way", groups={"layers": pair}), init_from="mean")
    entry = copy.deepcopy(model.config.tying)
    model.base_model.save_pretrained(tmp_path)
    assert model.config.tying == entry  # they share one config, whose names are the outer model's
    assert_tied(model)
    base = LlamaModel.from_pretrained(tmp_path)
    assert shared_names(base) == [sorted(n.removeprefix("model.") for n in pair)]


# --- models inside models --------------------------------------------------------------------------------------------


class Panel(PreTrainedModel):
    """Two language models in a `ModuleList` and one beside it: what ensembles and distillation set-ups look like."""

    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.members = nn.ModuleList([LlamaForCausalLM(copy.deepcopy(config)) for _ in range(2)])
        self.judge = LlamaForCausalLM(copy.deepcopy(config))
        self.post_init()

    def forward(self, input_ids, **kwargs):
        return sum(model(input_ids=input_ids).logits for model in (*self.members, self.judge))


HEADS = [f"{path}.lm_head.weight" for path in ("members.0", "members.1", "judge")]
EMBEDDINGS = [f"{path}.model.embed_tokens.weight" for path in ("members.0", "members.1", "judge")]


def panel(**changes) -> Panel:
    torch.manual_seed(0)
    return Panel(tiny_config("llama", **changes)).eval()


def panel_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(8)[None])


@pytest.mark.parametrize("save_format", FORMATS)
@pytest.mark.parametrize(
    "groups",
    [
        {"each": [HEADS[0], EMBEDDINGS[0]], "other": [EMBEDDINGS[1], HEADS[1]]},
        {"across": EMBEDDINGS},
        {"all": [*HEADS, *EMBEDDINGS]},
        {"judge": ["judge.model.layers.0.mlp.up_proj.weight", "members.1.model.layers.1.mlp.up_proj.weight"]},
        {"modules": ["members.0.model", "members.1.model"]},
    ],
    ids=["inside each", "across models", "everything", "layers of two models", "whole models"],
)
def test_ties_hold_inside_and_across_models_in_a_module_list(groups, save_format, tmp_path):
    model = panel(tie_word_embeddings=False)
    assert shared_names(model) == []
    tie(model, TyingConfig(groups=groups, save_format=save_format), init_from="mean")
    assert_tied(model)
    assert sorted(map(sorted, shared_names(model))) == sorted(sorted(group.names) for group in model.tie_groups)
    model.save_pretrained(tmp_path)
    loaded, info = Panel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_tied(loaded)
    assert shared_names(loaded) == shared_names(model)
    assert torch.equal(panel_logits(loaded), panel_logits(model))


@pytest.mark.parametrize("save_format", FORMATS)
def test_what_the_classes_inside_declare_is_kept_in_a_file_too(save_format, tmp_path):
    model = panel(tie_word_embeddings=True)
    pairs = [list(pair) for pair in zip(EMBEDDINGS, HEADS, strict=True)]
    assert shared_names(model) == pairs
    tie(model, TyingConfig(groups={"first": pairs[0]}, save_format=save_format))
    model.save_pretrained(tmp_path)
    loaded = Panel.from_pretrained(tmp_path)
    assert_tied(loaded)
    assert shared_names(loaded) == pairs
    assert torch.equal(panel_logits(loaded), panel_logits(model))


def test_a_class_over_the_mixin_holds_what_the_models_in_its_list_declare(tmp_path):
    class TiedPanel(TiedModelMixin, Panel):
        pass

    model = TiedPanel(tiny_config("llama", tie_word_embeddings=True)).eval()
    assert sorted(group.names for group in model.tie_groups) == sorted(zip(EMBEDDINGS, HEADS, strict=True))
    model.save_pretrained(tmp_path)
    loaded, info = TiedPanel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert_tied(loaded)
    assert shared_names(loaded) == shared_names(model)
    assert torch.equal(panel_logits(loaded), panel_logits(model))


def test_a_broken_tie_of_a_model_in_a_list_is_found():
    model = panel(tie_word_embeddings=True)
    assert_tied(model)
    split(model, [HEADS[1]])
    with pytest.raises(TyingError, match=HEADS[1]):
        assert_tied(model)


def test_one_model_inside_is_untied_and_the_others_stay_tied(tmp_path):
    model = panel(tie_word_embeddings=True)
    untie(model, [HEADS[1]])
    assert shared_names(model) == [[EMBEDDINGS[0], HEADS[0]], [EMBEDDINGS[2], HEADS[2]]]
    with torch.no_grad():
        model.get_parameter(HEADS[1]).add_(1.0)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    loaded = Panel.from_pretrained(tmp_path)
    assert shared_names(loaded) == shared_names(model)
    assert torch.equal(panel_logits(loaded), panel_logits(model))


def test_a_tied_part_of_a_model_can_be_saved_and_loaded_by_itself(tmp_path):
    model = panel(tie_word_embeddings=False)
    tie(model, {"first": [EMBEDDINGS[0], HEADS[0]]}, init_from=EMBEDDINGS[0])
    model.members[0].save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert_tied(loaded)
    assert shared_names(loaded) == [["model.embed_tokens.weight", "lm_head.weight"]]
    with torch.no_grad():
        ids = torch.arange(8)[None]
        # Not the same kernel: the outer class has its attention written out.
        torch.testing.assert_close(loaded(ids).logits, model.members[0].eval()(ids).logits)


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
