"""`tying_report` of a folder or of the Hub's cache: what the live model would say, from headers alone."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import nn

from hf_tying import TyingError, save_tied, tie, tying_report

from ..tiny import shared_names, tiny_model, untied_model
from .helpers import FORMATS, every_architecture, layers_and_embeddings, plain_count, tied

# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_format", FORMATS)
@every_architecture
def test_a_folder_is_reported_like_the_model_that_wrote_it(arch, save_format, tmp_path):
    model = tied(arch, save_format)
    model.save_pretrained(tmp_path)
    live, report = tying_report(model), tying_report(tmp_path)
    (expected,), (group,) = live.groups, report.groups
    assert group.names == expected.names and group.roles == expected.roles
    assert (group.shape, group.dtype) == (expected.shape, expected.dtype)
    assert group.in_file == (group.names if save_format == "portable" else group.names[:1])
    assert (group.declared, group.actual) == (True, None)
    for figure in ("parameters_saved", "bytes_saved", "optimizer_bytes_saved"):
        assert getattr(group, figure) == getattr(expected, figure)
    assert report.architecture == type(model).__name__ and report.scheme == live.scheme
    # What a file holds, plainly counted: without buffers, and without the names that repeat another one's values.
    buffers = dict(model.named_buffers())
    held = sum(t.numel() for n, t in load_file(tmp_path / "model.safetensors").items() if n not in buffers)
    again = (len(group.in_file) - 1) * model.get_parameter(group.root).numel()
    assert report.parameters == held - again


@pytest.mark.parametrize("save_format", FORMATS)
def test_shards_are_counted_together(save_format, tmp_path):
    model = layers_and_embeddings(save_format)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = (tying_report(tmp_path / kind).to_dict() for kind in ("whole", "shards"))
    assert whole.pop("source") != shards.pop("source")
    assert whole == shards
    assert whole["parameters"] == plain_count(model) and len(whole["groups"]) == 2


def test_no_weight_is_read(tmp_path):
    """A file of a terabyte, of which the disk holds only the header."""
    tied("llama", "portable").save_pretrained(tmp_path)
    rows, width = 2**22, 2**15
    size, offset, header = rows * width * 4, 0, {"__metadata__": {"format": "pt"}}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        header[name] = {"dtype": "F32", "shape": [rows, width], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    report = tying_report(tmp_path)
    assert report.parameters == rows * width
    assert report.groups[0].bytes_saved == size and report.groups[0].optimizer_bytes_saved == 2 * size


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "bert", "bart"])
def test_a_stock_folder_without_an_entry_is_reported_by_its_class(arch, tmp_path):
    model = tiny_model(arch, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "tying" not in json.loads((tmp_path / "config.json").read_text())
    report = tying_report(tmp_path)
    assert sorted(map(sorted, shared_names(model))) == sorted(sorted(group.names) for group in report.groups)
    assert all(group.in_file == group.names[:1] for group in report.groups)


@pytest.mark.parametrize("save_format", ["portable", "dedup"])
def test_the_folder_of_a_plain_module_is_reported_by_its_record(save_format, tmp_path):
    module = nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 4), nn.Linear(4, 20))
    save_tied(tie(module, ["0.weight", "2.weight"], init_from="0.weight"), tmp_path, save_format)
    report = tying_report(tmp_path)
    assert [group.names for group in report.groups] == [["0.weight", "2.weight"]] and report.ok
    assert report.parameters == sum(parameter.numel() for parameter in module.parameters())
    (tmp_path / "tying.json").write_text("{")
    with pytest.raises(TyingError, match="tying.json in .* cannot be read as JSON"):
        tying_report(tmp_path)


def test_a_stock_folder_that_is_untied_has_no_groups(tmp_path):
    untied_model("llama").save_pretrained(tmp_path)
    assert tying_report(tmp_path).groups == []


def test_a_class_that_transformers_does_not_have_is_reported_by_its_entry_and_its_code_is_not_run(tmp_path):
    model = layers_and_embeddings("portable")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["HouseModel"], "model_type": "house", "auto_map": {"AutoModel": "house.HouseModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "house.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    report = tying_report(tmp_path)
    assert {group.name: group.names for group in report.groups} == model.config.tying["groups"]
    assert report.parameters == plain_count(model) and report.architecture == "HouseModel"
    assert not (tmp_path / "ran").exists()


def test_a_declared_name_that_nothing_has_is_named_where_the_class_is_known_and_marked_where_not(tmp_path):
    tied("llama", "portable").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tying"]["groups"]["embeddings"].append("model.layers.9.weight")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TyingError, match="model.layers.9.weight"):
        tying_report(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["HouseModel"]}))
    report = tying_report(tmp_path)
    assert report.groups[0].in_file == ["model.embed_tokens.weight", "lm_head.weight"]
    assert "2 of 3" in report.to_table() and report.ok  # the class may have it, and a load fills it


# --- the Hub's cache -------------------------------------------------------------------------------------------------


def put_in_cache(cache: Path, repository: str, folder: Path) -> None:
    """What a download leaves behind: blobs by content, a snapshot of links to them, and the ref `main`."""
    root, commit = cache / f"models--{repository.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    snapshot = root / "snapshots" / commit
    for each in (snapshot, root / "blobs", root / "refs"):
        each.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for i, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, root / "blobs" / f"{i:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{i:064x}")


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "3KB"}], ids=["one file", "shards"])
def test_a_hub_id_is_reported_from_the_cache(shards, tmp_path, monkeypatch):
    model = layers_and_embeddings("portable")
    model.save_pretrained(tmp_path / "folder", **shards)
    put_in_cache(tmp_path / "cache", "house/tied-llama", tmp_path / "folder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    report = tying_report("house/tied-llama")
    assert report.source == "house/tied-llama"
    assert report.groups == tying_report(tmp_path / "folder").groups and len(report.groups) == 2


@pytest.mark.parametrize("name", ["house/not-there", "no such folder", "a/b/c", "../outside", ""])
def test_a_place_where_nothing_is_gives_an_error_that_names_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TyingError) as error:
        tying_report(name)
    assert repr(name) in str(error.value) or "config.json" in str(error.value)
