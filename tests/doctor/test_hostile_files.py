"""Files that somebody else wrote: an error of ours or an answer, no hang, bounded before memory is taken."""

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

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


@contextmanager
def content_of(path: Path, content: bytes) -> Iterator[None]:
    """A file with other content, and as it was at the end."""
    before = path.read_bytes() if path.exists() else None
    try:
        path.write_bytes(content)
        yield
    finally:
        path.unlink() if before is None else path.write_bytes(before)


def with_changes(path: Path, changes: dict) -> bytes:
    return json.dumps(json.loads(path.read_text()) | changes).encode()


@settings(max_examples=CASES)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_config(model, changes):
    with content_of(path := model / "config.json", with_changes(path, changes)):
        examined(model)


@settings(max_examples=CASES)
@given(changes=st.dictionaries(st.sampled_from(ADAPTER), JSON, min_size=1, max_size=3))
def test_any_adapter_config(adapter, changes):
    with content_of(path := adapter / "adapter_config.json", with_changes(path, changes)):
        examined(adapter)


@pytest.mark.parametrize("alpha", [[1], {}, "8", None, 10**400, float("nan")], ids=lambda alpha: str(alpha)[:9])
def test_any_scale_beside_a_tied_form(tmp_path, alpha):
    planted.forms_differ(tmp_path / "both")
    path = tmp_path / "both" / "adapter_config.json"
    path.write_bytes(with_changes(path, {"lora_alpha": alpha}))
    examined(tmp_path / "both")
    assert "T016" in {finding.code for finding in diagnose(tmp_path / "both")}


def test_a_tied_form_beside_a_lora_of_other_shapes(tmp_path):
    planted.forms_differ(tmp_path / "both")
    file, folder = "adapter_model.safetensors", tmp_path / "both"
    name = next(name for name in load_file(folder / file) if "lora_B" in name)
    planted.rewrite(folder, file, **{name: torch.zeros(3, 5)})
    (message,) = [finding.message for finding in diagnose(folder) if finding.code == "T016"]
    assert "do not have the shapes" in message


@settings(max_examples=CASES)
@given(at=st.integers(0, 400), new=st.binary(min_size=1, max_size=8))
def test_any_header(model, at, new):
    before = (path := model / "model.safetensors").read_bytes()
    with content_of(path, before[:at] + new + before[at + len(new) :]):
        examined(model)


@settings(max_examples=CASES)
@given(content=JSON | st.dictionaries(st.just("weight_map"), JSON))
def test_any_index(model, content):
    with content_of(model / "model.safetensors.index.json", json.dumps(content).encode()):
        examined(model)


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
