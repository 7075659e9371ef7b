"""`tying_report`: its figures against a plain count, on live models, on folders, and on the Hub's cache."""

import builtins
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from hf_tying import TyingConfig, TyingError, tie, tying_report, untie

from ..tiny import ALL, FULL_SCHEME, SEQ2SEQ, layer_pair, shared_names, split, tiny_model, untied_model

FORMATS = ("dedup", "portable")
every_architecture = pytest.mark.parametrize("arch", ALL)


def tied(arch: str, save_format: str | None = None, dtype=torch.float32):
    config = TyingConfig(scheme=FULL_SCHEME[arch], save_format=save_format)
    return tie(untied_model(arch, dtype=dtype), config, init_from="target")


def layers_and_embeddings(save_format: str | None = None):
    """A Llama with two groups."""
    model = untied_model("llama")
    config = TyingConfig(scheme="two_way", groups={"layers": layer_pair(model)}, save_format=save_format)
    return tie(model, config, init_from="mean")


def plain_count(model) -> int:
    return sum({id(p): p.numel() for p in model.parameters()}.values())


# --- live models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_architecture
def test_the_figures_of_a_live_model_are_those_of_a_plain_count(arch, dtype):
    before = plain_count(untied_model(arch, dtype=dtype))
    model = tied(arch, dtype=dtype)
    report = tying_report(model)
    (group,) = report.groups
    assert report.parameters == plain_count(model)
    assert group.parameters_saved == before - report.parameters > 0
    assert group.bytes_saved == group.parameters_saved * dtype.itemsize
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state[model.get_parameter(group.root)]
    one_matrix = sum(t.numel() * t.element_size() for t in (state["exp_avg"], state["exp_avg_sq"]))
    assert group.optimizer_bytes_saved == one_matrix * (len(group.names) - 1)
    assert sorted(group.names) == sorted(shared_names(model)[0])
    assert group.shape == list(model.get_parameter(group.root).shape)
    assert group.dtype == str(dtype).removeprefix("torch.")
    assert (group.declared, group.actual, group.in_file) == (True, True, None)
    expected = {"source", "target", "output"} if arch in SEQ2SEQ else {"target", "output"}
    assert set(group.roles.values()) == expected and set(group.roles) <= set(group.names)
    assert report.scheme == FULL_SCHEME[arch] and report.architecture == type(model).__name__


def test_an_untied_model_has_no_groups():
    model = untied_model("llama")
    for report in (tying_report(model), tying_report(untie(tied("llama")))):
        assert report.groups == [] and report.scheme in (None, "none")
        assert report.parameters == plain_count(model)
        assert report.to_dict()["parameters_saved"] == report.to_dict()["bytes_saved"] == 0
        assert "nothing is tied" in report.to_table()


def test_a_stock_model_is_reported_by_what_its_class_declares():
    model = tiny_model("bert", tie_word_embeddings=True)
    report = tying_report(model)
    assert sorted(map(sorted, shared_names(model))) == sorted(sorted(group.names) for group in report.groups)
    assert all(group.declared and group.actual for group in report.groups) and len(report.groups) == 2


def test_a_broken_tie_is_declared_but_not_so_and_saves_nothing():
    model = tied("llama")
    split(model, ["lm_head.weight"])
    report = tying_report(model)
    (group,) = report.groups
    assert (group.declared, group.actual) == (True, False)
    assert group.parameters_saved == group.bytes_saved == group.optimizer_bytes_saved == 0
    assert report.parameters == plain_count(model) and report.scheme == "none"
    assert "NO" in report.to_table()


def test_a_tie_that_is_partly_broken_saves_what_is_still_shared():
    model = tied("bart")
    split(model, ["lm_head.weight"])
    (group,) = tying_report(model).groups
    assert group.actual is False
    assert group.parameters_saved == 2 * model.lm_head.weight.numel()  # three names still share, of four


def test_a_tie_that_nobody_declared_is_shown_as_such():
    model = tied("llama")
    first, second = layer_pair(model)
    path, _, attribute = second.rpartition(".")
    setattr(model.get_submodule(path), attribute, model.get_parameter(first))
    by_declared = {group.declared: group for group in tying_report(model).groups}
    assert sorted(by_declared[False].names) == sorted([first, second]) and by_declared[False].actual
    assert by_declared[True].names == ["model.embed_tokens.weight", "lm_head.weight"]


def test_wrappers_are_looked_through():
    from peft import LoraConfig, get_peft_model

    model = tied("llama")
    expected = tying_report(model).groups
    assert tying_report(torch.compile(model)).groups == expected
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    assert tying_report(adapted).groups == expected


def test_something_else_than_a_model_is_refused():
    with pytest.raises(TyingError, match="Linear"):
        tying_report(torch.nn.Linear(2, 2))


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
    (row,) = (line for line in report.to_table(200).splitlines() if "model.layers.9.weight" in line)
    assert "NO" in row


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


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["live", "folder"])
def report(request, tmp_path):
    model = layers_and_embeddings("portable")
    if request.param == "live":
        return tying_report(model)
    model.save_pretrained(tmp_path / "model")
    return tying_report(tmp_path / "model")


def test_to_dict_is_plain_json_with_the_sums(report):
    content = report.to_dict()
    assert json.loads(json.dumps(content)) == content == json.loads(report.to_json())
    assert len(content["groups"]) == 2
    for figure in ("parameters_saved", "bytes_saved", "optimizer_bytes_saved"):
        assert content[figure] == sum(group[figure] for group in content["groups"]) > 0


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_table_fits_its_width_and_shows_every_name_and_figure(report, width):
    table = report.to_table(width)
    assert max(len(line) for line in table.splitlines()) <= width
    words = "".join(table.replace("│", " ").split())
    if width == 200:  # narrower columns fold the names
        for group in report.groups:
            assert all(name in table for name in group.names)
            assert f"{group.parameters_saved:,}" in table
            assert "x".join(map(str, group.shape)) in words
        assert f"{report.parameters:,}" in table and "two_way" in table
    assert str(report) == report.to_table()


def test_the_picture_is_written_in_the_format_of_its_name(report, tmp_path):
    assert report.plot(tmp_path / "ties.png") == tmp_path / "ties.png"
    assert (tmp_path / "ties.png").read_bytes().startswith(b"\x89PNG\r\n")
    report.plot(str(tmp_path / "ties.svg"))
    drawn = (tmp_path / "ties.svg").read_text()
    for group in report.groups:
        assert all(name in drawn for name in group.names)  # matplotlib notes each text that it draws


def test_a_picture_of_nothing_tied_can_be_drawn(tmp_path):
    tying_report(untied_model("gpt2")).plot(tmp_path / "none.png")
    assert (tmp_path / "none.png").stat().st_size > 1000


def test_without_matplotlib_the_picture_says_what_to_install(report, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"hf-tying\[plots\]"):
        report.plot(tmp_path / "ties.png")


# --- bad folders -----------------------------------------------------------------------------------------------------


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
    with pytest.raises(TyingError, match="config.json"):
        tying_report(tmp_path)


def test_a_folder_without_safetensors_says_what_is_expected(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
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
        assert "architectures" in changes and "tying" not in changes  # the entry says it all without the class
        assert report.groups[0].names == ["model.embed_tokens.weight", "lm_head.weight"]
        assert json.loads(report.to_json())
