"""Every command on folders with relaxed groups and shared layers: right, or refused before anything is written."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_tying import TyingConfig, TyingError, share_layers, tie, tying_report, untie
from hf_tying.depth import unroll
from hf_tying.doctor import diagnose, forecast, inspect, rewrite
from hf_tying.doctor.comparing import compare
from hf_tying.hub import make_card, publish
from hf_tying.hub.publishing import MissingChoice
from hf_tying.report.checkpoint import read_checkpoint
from hf_tying.report.opening import open_source

from ..tiny import layer_pair, logits, tiny_model, untied_model
from . import planted

LORA = {"kind": "lora", "rank": 2}
NORM = "model.layers.2.input_layernorm.weight"


def relaxed(names, save_format):
    model = untied_model("llama")
    groups = {"g": {"names": names or layer_pair(model), "relax": LORA}}
    entry = {"version": 2, "groups": groups, "save_format": save_format}
    return _with_differences(tie(model, TyingConfig.of(entry), init_from="mean"))


def shared(save_format, relax=None):
    model = tiny_model("llama", num_hidden_layers=4, tie_word_embeddings=True)
    return _with_differences(share_layers(model, "cycle", 2, relax=relax, save_format=save_format))


def _with_differences(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_relaxation" in name:
                parameter += torch.randn(parameter.shape, generator=generator)
    return model.eval()


MAKERS = {
    "relaxed embeddings": lambda form: relaxed([planted.EMBEDDING, planted.HEAD], form),
    "relaxed layers": lambda form: relaxed(None, form),
    "shared layers": shared,
    "shared and relaxed layers": lambda form: shared(form, LORA),
}
every_folder = pytest.mark.parametrize("saved", [(k, f) for k in MAKERS for f in ("portable", "dedup")], indirect=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder_of(kind, form):
        if (kind, form) not in made:
            model = MAKERS[kind](form)
            made[kind, form] = tmp_path_factory.mktemp("folders") / "model", model
            model.save_pretrained(made[kind, form][0])
        return made[kind, form]

    return folder_of


@pytest.fixture
def saved(folders, request):
    """The folder and the model that wrote it."""
    return folders(*request.param)


@every_folder
def test_it_has_no_disease_and_is_reported_like_the_model(saved):
    folder, model = saved
    assert diagnose(folder) == [] == inspect(folder).findings
    live, report = (
        {frozenset(g.names): g.parameters_saved for g in tying_report(of).groups} for of in (model, folder)
    )
    # What differences share among themselves has a group in a live model alone.
    assert report == {names: saved for names, saved in live.items() if not any("_relaxation" in n for n in names)}
    assert inspect(folder).parameters == sum(parameter.numel() for parameter in model.parameters())
    assert compare(folder, folder) == []


@every_folder
@pytest.mark.parametrize("to", ["two_way", "none", "portable", "dedup", "merged"])
def test_it_is_not_rewritten_from_its_files(saved, to, tmp_path):
    with pytest.raises(TyingError, match=r"load it, (untie|unroll)\(model\), or tie\(model, TyingConfig\(save_format"):
        rewrite(saved[0], tmp_path / "new", to, init_from="target")
    assert not [*tmp_path.iterdir()]


@every_folder
@pytest.mark.parametrize("way", ["apart", "portable", "dedup"])
def test_the_ways_out_of_that_keep_the_function(saved, way, tmp_path):
    folder, before = saved
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if way == "apart":
        (unroll if TyingConfig.in_config(model.config).depth else untie)(model)
    else:
        tie(model, TyingConfig(save_format=way))
    model.save_pretrained(tmp_path)
    assert diagnose(tmp_path) == []
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(before))


def test_an_unrolled_model_is_rewritten(folders, tmp_path):
    model = unroll(AutoModelForCausalLM.from_pretrained(folders("shared layers", "portable")[0]))
    model.save_pretrained(tmp_path / "unrolled")
    rewrite(tmp_path / "unrolled", tmp_path / "new", "none")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "new")), logits(model))


def test_what_a_relaxation_does_not_touch_must_still_be_one(folders, tmp_path):
    folder = planted.copy_of(folders("shared and relaxed layers", "portable")[0], tmp_path / "model")
    planted.rewrite(folder, **{NORM: planted.tensor(folder, NORM) + 1})
    (finding,) = diagnose(folder)
    assert finding.code == "T001" and NORM in finding.message


def test_a_relaxed_name_that_a_file_lacks_is_not_its_root(folders, tmp_path):
    portable, dedup = (folders("relaxed embeddings", form)[0] for form in ("portable", "dedup"))
    assert [(each["what"], each["name"]) for each in compare(portable, dedup)] == [
        ("config", "tying"), ("name", planted.HEAD),
    ]  # fmt: skip


@pytest.mark.parametrize("form, outcome", [("portable", "tie"), ("dedup", "refuse")])
def test_the_forecast_knows_files_that_stock_loaders_do_not_find(folders, form, outcome):
    checkpoint = read_checkpoint(open_source(folders("shared layers", form)[0]))
    found = {each.loader: each.outcome for each in forecast(checkpoint)}
    assert found["transformers"] == outcome and found["vllm"] == ("tie" if form == "portable" else "unknown")


@every_folder
def test_its_card_says_what_loaders_without_the_package_get(saved, tmp_path):
    folder, model = saved
    text = make_card(folder, save=False).content
    planted.edit(planted.copy_of(folder, tmp_path / "stock"), tying=None)
    try:
        found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval())
        said = "right values" if torch.allclose(found, logits(model), atol=1e-5) else "**wrong values**"
    except OSError:
        said = "an error: the file has each shared layer once"
    assert f"What you get without `hf_tying`: {said}" in text
    assert ("With transformers alone" in text) is (said == "right values")
    assert f"library_name: {'transformers' if said == 'right values' else 'hf_tying'}" in text
    entry = TyingConfig.in_config(model.config)
    relaxed = bool(entry.relax) or any("relax" in stack for stack in entry.depth)
    assert ("with differences" in text) is relaxed
    assert ("softmax are **one matrix**" in text) is bool(entry.depth)


@pytest.mark.parametrize("way", ["random", "right"])
def test_a_file_that_others_fill_with_random_numbers_is_published_by_consent_alone(folders, way, tmp_path):
    folder = folders("relaxed layers", "dedup" if way == "random" else "portable")[0]
    if way == "right":
        publish(folder, "me/x", dry_run=True, run=False)
        return
    with pytest.raises(MissingChoice, match="fill the others with random numbers"):
        publish(folder, "me/x", dry_run=True, run=False)
    publish(folder, "me/x", dry_run=True, run=False, yes=True)
