"""A broken tie is found, in a live model and in a file, and what it no longer saves is not counted."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_tying import TyingError, assert_tied, tying_report
from hf_tying.report import file_values

from ..tiny import tiny_model, untied_model
from .helpers import FORMATS, MODELS, broken, every_architecture, every_form, layers_and_embeddings, plain_count, tied


def rewrite(folder, **values) -> None:
    """The weights of a folder with some tensors set, or with `None` left out."""
    held = load_file(folder / "model.safetensors") | values
    save_file({k: v for k, v in held.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


def edit(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensor_bytes(folder) -> int:
    return sum(t.numel() * t.element_size() for t in load_file(folder / "model.safetensors").values())


# --- live models -----------------------------------------------------------------------------------------------------


@every_form
def test_the_report_has_an_error_exactly_where_assert_tied_raises(form):
    model = MODELS[form]()
    report = tying_report(model)
    try:
        assert_tied(model)
    except TyingError as error:
        assert not report.ok and all(finding.message in str(error) for finding in report.findings)
    else:
        assert report.ok and not report.findings


@every_architecture
def test_a_broken_tie_of_a_live_model_is_a_finding(arch):
    model = tied(arch)
    name = tying_report(model).groups[0].names[-1]
    report = tying_report(broken(arch, name))
    (finding,) = report.findings
    (group,) = (group for group in report.groups if group.broken)
    assert (finding.code, finding.severity, finding.group) == ("T001", "error", group.name)
    assert name in finding.message and group.apart == [name]
    assert (
        group.parameters_held
        == plain_count(broken(arch, name)) - plain_count(model) + model.get_parameter(name).numel()
    )


def test_the_copy_that_peft_trains_in_place_of_one_side_is_a_broken_tie():
    adapted = get_peft_model(tied("llama"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    report = tying_report(adapted)
    assert not report.ok and report.groups[0].broken and report.groups[0].apart == ["lm_head.weight"]


def test_a_tie_made_by_hand_is_shown_and_is_no_fault_of_a_stock_model():
    model = untied_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    report = tying_report(model)
    assert report.groups[0].status == "by hand" and "by hand" in report.to_table() and report.ok


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_format", FORMATS)
@every_architecture
def test_the_savings_in_the_file_are_those_of_the_files(arch, save_format, tmp_path):
    from hf_tying import untie

    tied(arch, save_format).save_pretrained(tmp_path / "tied")
    untie(tied(arch, save_format)).save_pretrained(tmp_path / "untied")
    report = tying_report(tmp_path / "tied")
    saved = tensor_bytes(tmp_path / "untied") - tensor_bytes(tmp_path / "tied")
    assert report.to_dict()["file_bytes_saved"] == saved and report.ok
    assert (saved > 0) == (save_format == "dedup")
    assert ("root only" if save_format == "dedup" else "all") in report.to_table()
    assert "NO" not in report.to_table()


def test_a_live_model_has_no_savings_in_a_file():
    assert tying_report(tied("gpt2")).to_dict()["file_bytes_saved"] is None


CHANGES = {
    "all values": lambda matrix: matrix + 1,
    "one row": lambda matrix: torch.cat([matrix[:-1], matrix[-1:] * 2]),
    "one element": lambda matrix: matrix.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(9.0)),
    "the dtype": lambda matrix: matrix.bfloat16(),
}


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "with an entry"])
@pytest.mark.parametrize("change", CHANGES)
def test_two_different_matrices_in_a_file_that_declares_one_are_found(change, stock, tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True) if stock else tied("llama", "portable")
    model.save_pretrained(tmp_path)
    matrix = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tmp_path, **{"lm_head.weight": CHANGES[change](matrix)})
    report = tying_report(tmp_path)
    (group,), (finding,) = report.groups, report.findings
    assert group.broken and group.apart == ["lm_head.weight"] and group.compared == "whole"
    assert finding.code == "T001" and "lm_head.weight" in finding.message and not report.ok
    assert group.parameters_saved == group.bytes_saved == group.optimizer_bytes_saved == 0
    assert report.parameters == plain_count(model) + matrix.numel()
    assert "BROKEN" in report.to_table() and "differ" in report.to_table()


def test_a_stock_file_that_holds_both_names_with_one_value_is_fine(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, **{"lm_head.weight": model.lm_head.weight.detach().clone()})
    report = tying_report(tmp_path)
    assert report.ok and report.groups[0].parameters_saved == 64 * 16 and report.groups[0].file_bytes_saved == 0


@pytest.mark.parametrize(
    "on_conflict, status, saved", [("keep_untied", "apart", 0), ("use:lm_head.weight", "tied", 64 * 16)]
)
def test_a_config_that_says_what_to_do_with_different_values_is_believed(on_conflict, status, saved, tmp_path):
    tied("llama", "portable").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edit(tmp_path, tying=config["tying"] | {"on_conflict": on_conflict})
    rewrite(tmp_path, **{"lm_head.weight": torch.zeros(64, 16)})
    report = tying_report(tmp_path)
    assert report.ok and report.groups[0].status == status and report.groups[0].parameters_saved == saved


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "3KB"}], ids=["one file", "shards"])
def test_one_group_of_several_is_found_broken_and_the_other_is_not(shards, tmp_path):
    model = layers_and_embeddings("portable")
    model.save_pretrained(tmp_path, **shards)
    pair = model.config.tying["groups"]["layers"]
    for file in tmp_path.glob("*.safetensors"):
        held = load_file(file)
        if pair[1] in held:
            save_file(held | {pair[1]: held[pair[1]] + 1}, file, {"format": "pt"})
    report = tying_report(tmp_path)
    assert [group.name for group in report.groups if not group.broken] == ["embeddings"]
    assert [group.apart for group in report.groups if group.broken] == [[pair[1]]]


@pytest.mark.parametrize("save_format", FORMATS)
def test_a_file_without_any_name_of_a_group_is_found(save_format, tmp_path):
    tied("llama", save_format).save_pretrained(tmp_path)
    rewrite(tmp_path, **{"lm_head.weight": None, "model.embed_tokens.weight": None})
    report = tying_report(tmp_path)
    (finding,) = report.findings
    assert finding.code == "T003" and report.groups[0].broken and "none" in report.to_table()


def test_matrices_too_large_to_be_read_are_compared_in_samples(monkeypatch, tmp_path):
    tied("llama", "portable").save_pretrained(tmp_path)
    monkeypatch.setattr(file_values, "WHOLE", 100)
    monkeypatch.setattr(file_values, "_SAMPLE", 8)
    monkeypatch.setattr(file_values, "_SAMPLES", 4)
    report = tying_report(tmp_path)
    assert report.ok and report.groups[0].compared == "samples" and "(samples)" in report.to_table()
    rewrite(tmp_path, **{"lm_head.weight": torch.zeros(64, 16)})
    assert not tying_report(tmp_path).ok


@pytest.mark.parametrize("size", [2**16, 2**30 + 1, 10**12])
def test_samples_reach_from_the_first_byte_to_the_last(size):
    pieces = file_values._spread(size, file_values._SAMPLES, file_values._SAMPLE)
    assert pieces[0][0] == 0 and sum(pieces[-1]) == size and len(pieces) == 256
