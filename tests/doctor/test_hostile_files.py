"""Files that somebody else wrote: an error of ours or an answer, no hang, bounded before memory is taken."""

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_tying import TyingError
from hf_tying.doctor import diagnose, inspect
from hf_tying.ties.headers import parse_header, read_json

from ..processes import at_most
from . import planted

#: `make test-upstream` draws ten times as many.
CASES = int(os.environ.get("HOSTILE_CASES", "250"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ("tie_word_embeddings", "vocab_size", "num_hidden_layers", "architectures", "model_type", "tying", "auto_map",
          "hidden_size", "text_config", "dtype", "quantization_config", "rope_parameters", "layer_types")  # fmt: skip
ADAPTER = ("peft_type", "r", "target_modules", "adapted_modules", "base_model_name_or_path", "modules_to_save",
           "train_u", "variant", "lora_alpha", "layer_groups")  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return planted.held(tmp_path_factory.mktemp("hostile") / "model", save_format="portable")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    planted.tied_form_alone(folder := tmp_path_factory.mktemp("hostile") / "adapter")
    return folder


def examined(folder: Path) -> None:
    """An answer, or an error of ours."""
    for look in (inspect, diagnose):
        try:
            with at_most(20):
                look(folder)
        except TyingError as error:
            assert str(error)


@settings(max_examples=CASES)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_config(model, changes):
    path = model / "config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | changes))
        examined(model)
    finally:
        path.write_text(before)


@settings(max_examples=CASES)
@given(changes=st.dictionaries(st.sampled_from(ADAPTER), JSON, min_size=1, max_size=3))
def test_any_adapter_config(adapter, changes):
    path = adapter / "adapter_config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | changes))
        examined(adapter)
    finally:
        path.write_text(before)


@settings(max_examples=CASES)
@given(at=st.integers(0, 400), new=st.binary(min_size=1, max_size=8))
def test_any_header(model, at, new):
    path = model / "model.safetensors"
    before = path.read_bytes()
    try:
        path.write_bytes(before[:at] + new + before[at + len(new) :])
        examined(model)
    finally:
        path.write_bytes(before)


@settings(max_examples=CASES)
@given(content=JSON | st.dictionaries(st.just("weight_map"), JSON))
def test_any_index(model, content):
    path = model / "model.safetensors.index.json"
    try:
        path.write_text(json.dumps(content))
        examined(model)
    finally:
        path.unlink()


@settings(max_examples=CASES)
@given(at=st.integers(0, 200), new=st.binary(min_size=1, max_size=8))
def test_any_gguf(tmp_path_factory, at, new):
    content = planted.gguf_header({"token_embd.weight": [16, 64], "output.weight": [16, 64]})
    folder = tmp_path_factory.getbasetemp() / "gguf"
    folder.mkdir(exist_ok=True)
    (folder / "model.gguf").write_bytes(content[:at] + new + content[at + len(new) :])
    examined(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to itself"])
def test_what_is_no_regular_file_is_not_opened(model, tmp_path, file, kind):
    folder = planted.copy_of(model, tmp_path / "model")
    (folder / file).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / file)
    elif kind == "device":
        (folder / file).symlink_to("/dev/zero")
    elif kind == "folder":
        (folder / file).mkdir()
    else:
        (folder / file).symlink_to(folder / file)
    examined(folder)


def test_a_config_of_gigabytes_is_not_read(model, tmp_path):
    folder = planted.copy_of(model, tmp_path / "model")
    with (folder / "config.json").open("r+b") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(TyingError, match="bytes: more than"):
        inspect(folder)


@pytest.mark.parametrize("layers", [20_000, 10**9, float("inf"), [10**9], "many"])
def test_counts_without_measure_build_nothing(model, tmp_path, layers):
    folder = planted.copy_of(model, tmp_path / "model")
    planted.edit(folder, num_hidden_layers=layers, tying=None)
    with at_most(10):
        findings = diagnose(folder)
    assert {finding.code for finding in findings} >= {"T022"}


def test_more_tensors_than_any_model_has_are_counted_before_they_are_read():
    one = b'"%d":{"dtype":"F32","shape":[],"data_offsets":[0,0]},'
    header = b"{" + b"".join(one % i for i in range(160_000))[:-1] + b"}"
    with pytest.raises(ValueError, match="more than 150,000 tensors"):
        parse_header(header, len(header) + 8)


def test_lists_without_end_are_counted_before_they_are_read(tmp_path):
    (tmp_path / "x.json").write_text('{"a": [' + "[]," * 200_000 + "[]]}")
    with pytest.raises(TyingError, match="objects and lists"):
        read_json(tmp_path / "x.json")


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    planted.tied(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    ran = tmp_path / "ran"
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(ran).encode())
    with pytest.raises(TyingError, match="weights_only"):
        inspect(tmp_path / "model")
    assert not ran.exists()


def test_a_header_that_claims_more_than_its_file_is_refused(model, tmp_path):
    folder = planted.copy_of(model, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(TyingError, match="model.safetensors"):
        inspect(folder)
