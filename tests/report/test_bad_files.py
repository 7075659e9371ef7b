"""Folders that are broken, truncated or hostile: each is an error that names the file, never a crash."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from transformers import AutoModel

from hf_tying import TyingError, tying_report

from .helpers import tied


@pytest.fixture
def folder(tmp_path):
    tied("llama", "portable").save_pretrained(tmp_path)
    return tmp_path


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> Path:
    """The folder in shards; its index."""
    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="3KB")
    return folder / "model.safetensors.index.json"


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(TyingError, match="has no config.json: expected a folder that save_pretrained"):
        tying_report(tmp_path)


def test_a_folder_without_safetensors_says_what_is_expected(folder):
    (folder / "model.safetensors").rename(folder / "weights.msgpack")
    with pytest.raises(TyingError, match="model.safetensors"):
        tying_report(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TyingError, match="model.safetensors"):
        tying_report(folder)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**62, 2**64 - 1])
def test_a_header_of_a_wrong_length_is_refused(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(TyingError, match="model.safetensors"):
        tying_report(folder)


def test_a_missing_shard_is_named(folder):
    index = shard(folder)
    gone = sorted(folder.glob("*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(TyingError, match=gone.name):
        tying_report(folder)
    index.write_text("{}")
    with pytest.raises(TyingError, match="index.json"):
        tying_report(folder)


@pytest.mark.parametrize(
    "weight_map", [None, 5, "model.safetensors", ["a"], {"a": 5}, {"a": None, "b": "c"}, {"a": ["b"]}]
)
def test_a_malformed_index_is_named(folder, weight_map):
    edit(shard(folder), weight_map=weight_map)
    with pytest.raises(TyingError, match="index.json"):
        tying_report(folder)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/elsewhere.safetensors"])
def test_an_index_that_points_out_of_its_folder_is_refused(folder, name):
    """A checkpoint that somebody else wrote has no business with other files of this machine."""
    index = shard(folder)
    outside = folder.parent / "elsewhere.safetensors"
    first = sorted(folder.glob("*.safetensors"))[0]
    shutil.copy(first, outside)
    weight_map = json.loads(index.read_text())["weight_map"]
    name = str(outside) if name.startswith("/") else name
    edit(index, weight_map={key: name if file == first.name else file for key, file in weight_map.items()})
    with pytest.raises(TyingError, match="index.json"):
        tying_report(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"tied"', "[" * 100_000, '{"a":' * 100_000, "\x00\xff"], ids=lambda text: text[:8]
)
def test_a_config_that_is_no_json_object_is_named(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(TyingError, match="config.json"):
        tying_report(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"tying": "two_way"},
        {"tying": {"version": 99}},
        {"tying": {"version": 1, "scheme": "four_way"}},
        {"tying": {"version": 1, "groups": {"a": ["lm_head.weight"]}}},
        {"architectures": 5},
        {"architectures": {}},
        {"architectures": [5], "model_type": 5},
        {"architectures": ["LlamaForCausalLM"], "hidden_size": "wide", "tying": None},
        {"architectures": ["LlamaForCausalLM"], "hidden_size": -1, "tying": None},
        {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": [2], "tying": None},
    ],
    ids=str,
)
def test_a_config_with_wrong_values_is_an_error_or_a_report_and_never_a_crash(folder, changes):
    edit(folder / "config.json", **changes)
    try:
        report = tying_report(folder)
    except TyingError as error:
        assert str(error)
    else:
        assert not changes.get("tying")  # the entry, or the table, says it all without the class
        assert report.groups[0].names == ["model.embed_tokens.weight", "lm_head.weight"]
        assert json.loads(report.to_json())
