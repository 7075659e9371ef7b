"""Other processes, with this package and without it, read the files of tied models and compute the same logits."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from hf_tying import TyingConfig, tie, untie

from ..processes import run_python
from ..tiny import ALL, FULL_SCHEME, layer_pair, logits, shared_names, untied_model
from .helpers import DTYPES, FORMATS, by_name, every_architecture, step, the_group, tied

WITHOUT, FIRST, LAST = "without the package", "package before transformers", "package after transformers"
# What a user's programs do, for many folders at once. One process has the package first, the other one last.
CHILD = f"""
import json, pathlib, sys

work, out, first = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:] == [{FIRST!r}]


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_tying":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


def read_all(way):
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
    save_file(values, out / way / "logits.safetensors")
    (out / way / "found.json").write_text(json.dumps(found))


absent = Absent()
if first:
    import hf_tying
    assert "torch" not in sys.modules
else:
    sys.meta_path.insert(0, absent)
import torch, transformers.modeling_utils
from safetensors.torch import save_file
from transformers.utils import logging
torch.set_num_threads(1)
logging.disable_progress_bar()
logging.set_verbosity_error()
from tests.tiny import AUTO, logits, shared_names

if first:
    read_all({FIRST!r})
else:
    read_all({WITHOUT!r})
    assert "hf_tying" not in sys.modules
    sys.meta_path.remove(absent)
    import hf_tying
    read_all({LAST!r})
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
            for way in (WITHOUT, FIRST, LAST):
                (base / way).mkdir()
            for way in (FIRST, LAST):
                run_python("-c", CHILD, base / "work", base, way)
            (base / "complete").touch()
    return base


pytestmark = pytest.mark.timeout(400)  # the first test waits for all processes
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
