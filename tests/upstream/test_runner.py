"""The runner itself, without its download: what counts as a failure, and what it says when it cannot run."""

import io
import json
import tarfile
import time
from types import SimpleNamespace

import peft
import pytest
from transformers import AutoModelForCausalLM
from typer import Typer
from typer.testing import CliRunner

from hf_tying.peft import TiedLoraConfig

from . import lora_models, sweep
from .examine import Examination, Finding
from .lora_tests import of_lora_alone, of_tied_lora, why_not
from .report import Session, findings, joined
from .sdist import SdistError, _unpack_tests, fetch_tests


def session(tmp_path, name, collected=None, **outcomes):
    """A session file with one result for each `test=outcome` of family Llama, read back."""
    path = tmp_path / name
    header = {"collected": len(outcomes) if collected is None else collected, "deselected": {}}
    results = [{"family": "Llama", "test": t, "outcome": o, "reason": f"why {o}"} for t, o in outcomes.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *results]))
    return Session(path).read()


def test_a_failure_that_the_stock_class_has_too_is_shown_and_does_not_count(tmp_path):
    tied = session(tmp_path, "tied", test_a="failed", test_b="failed", test_c="passed")
    stock = session(tmp_path, "stock", test_a="failed", test_b="passed", test_c="passed")
    assert [(f.test, f.counts) for f in findings(tied, stock)] == [("test_a", False), ("test_b", True)]


def test_a_test_that_only_the_tied_class_skips_counts_as_a_failure(tmp_path):
    tied = session(tmp_path, "tied", test_a="skipped", test_b="skipped")
    stock = session(tmp_path, "stock", test_a="passed", test_b="skipped")
    assert [(f.test, f.reason, f.counts) for f in findings(tied, stock)] == [("test_a", "skipped: why skipped", True)]


def test_a_failure_of_a_test_that_the_control_does_not_have_counts(tmp_path):
    tied, stock = session(tmp_path, "tied", test_own="failed"), session(tmp_path, "stock", test_a="passed")
    assert [(f.test, f.counts) for f in findings(tied, stock)] == [("test_own", True)]


def test_with_the_stock_classes_alone_each_failure_counts(tmp_path):
    assert [f.counts for f in findings(None, session(tmp_path, "stock", test_a="failed"))] == [True]


def test_a_session_that_died_on_the_way_is_not_complete(tmp_path):
    assert session(tmp_path, "whole", test_a="passed").complete
    assert not session(tmp_path, "half", collected=2, test_a="passed").complete
    assert not Session(tmp_path / "absent").read().complete


def archive(path, *names):
    with tarfile.open(path, "w:gz") as files:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 4
            files.addfile(member, io.BytesIO(b"pass"))
    return path


def test_only_the_top_level_test_files_are_unpacked(tmp_path):
    names = ["t-1/tests/test_modeling_common.py", "t-1/tests/deep/test_x.py", "t-1/src/a.py", "t-1/tests/a.txt"]
    _unpack_tests(archive(tmp_path / "t.tar.gz", *names), tmp_path / "tests")
    assert [path.name for path in (tmp_path / "tests").iterdir()] == ["test_modeling_common.py"]


def test_an_sdist_without_the_common_tests_is_refused(tmp_path):
    with pytest.raises(SdistError, match="holds no tests/test_modeling_common.py.*Way out"):
        _unpack_tests(archive(tmp_path / "t.tar.gz", "t-1/src/a.py"), tmp_path / "tests")


def test_without_an_index_the_error_says_the_way_out_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SdistError, match="could not download(.|\n)*Way out"):
        fetch_tests("5.0.0", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_sdist_of_peft_is_asked_for_the_common_tests_of_peft(tmp_path):
    path = archive(tmp_path / "t.tar.gz", "t-1/tests/test_modeling_common.py")
    with pytest.raises(SdistError, match="holds no tests/testing_common.py"):
        _unpack_tests(path, tmp_path / "tests", "testing_common.py")


def test_sessions_of_two_packages_are_one_in_the_report(tmp_path):
    whole = joined([session(tmp_path, "a", test_a="passed"), session(tmp_path, "b", test_b="failed")])
    assert whole.complete
    assert [(f.test, f.counts) for f in findings(whole, None)] == [("test_b", True)]


def test_settings_of_lora_become_those_of_tied_lora():
    lora = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "bias": "lora_only", "use_dora": False}
    assert of_tied_lora(lora) == {"r": 4, "alpha": 8, "init_weights": False, "bias": "tied_lora_only"}
    assert of_tied_lora({"variant": "TL5"})["variant"] == "TL5"


def test_only_settings_that_lora_alone_has_and_that_say_something_are_named():
    assert of_lora_alone({"r": 4, "use_dora": False, "rank_pattern": {}, "init_lora_weights": False}) == []
    assert of_lora_alone({"use_dora": True, "init_lora_weights": "pissa"}) == ["use_dora", "init_lora_weights"]


def item(name="test_a", function=joined, **params):
    """As pytest would hand over a test with these parameters."""
    fixtures = SimpleNamespace(name2fixturedefs={})
    callspec = SimpleNamespace(params=params)
    return SimpleNamespace(name=name, function=function, callspec=callspec, _fixtureinfo=fixtures)


def test_a_case_of_lora_is_run_and_one_of_another_method_is_not_meant():
    case = {"config_cls": TiedLoraConfig, "config_kwargs": {"target_modules": ["lin0"]}, "model_id": "MLP"}
    assert why_not(item(**case), TiedLoraConfig) is None
    assert why_not(item(**case | {"config_cls": peft.VeraConfig}), TiedLoraConfig) == ""
    assert why_not(item(), TiedLoraConfig) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"config_kwargs": {"use_dora": True}}, "use_dora"),
        ({"model_id": "Conv2d"}, "does not adapt"),
        ({"config_kwargs": {"target_modules": ["mha"]}}, "does not adapt"),
        ({"name": "test_weighted_combination_of_adapters[x]"}, "add_weighted_adapter"),
    ],
)
def test_a_case_that_only_lora_can_have_is_left_out_with_a_reason(change, reason):
    case = {"config_cls": TiedLoraConfig, "config_kwargs": {"target_modules": ["lin0"]}, "model_id": "MLP"}
    assert reason in why_not(item(**case | change), TiedLoraConfig)


def a_test_of_lora():
    assert peft.LoraConfig().lora_alpha == 8


def test_a_test_that_reads_parts_of_lora_is_left_out_with_what_it_reads(monkeypatch):
    monkeypatch.setattr(a_test_of_lora, "__module__", "tests.test_custom_models")
    assert why_not(item(function=a_test_of_lora), TiedLoraConfig) == "reads LoRA's own parts: lora_alpha"


def test_models_are_made_once_and_found_without_a_network(tmp_path, monkeypatch):
    name = "trl-internal-testing/tiny-random-LlamaForCausalLM"
    class_name, sizes = lora_models.MODELS[name]
    monkeypatch.setattr(lora_models, "MODELS", {name: (class_name, dict(sizes))})

    def vocabulary():
        return AutoModelForCausalLM.from_pretrained(name, cache_dir=tmp_path, local_files_only=True).vocab_size

    lora_models.make_models(tmp_path)
    assert vocabulary() == 1024
    (weights,) = tmp_path.rglob("*.safetensors")
    written = weights.stat().st_mtime_ns
    lora_models.make_models(tmp_path)
    assert weights.stat().st_mtime_ns == written
    monkeypatch.setitem(lora_models.MODELS[name][1], "vocab_size", 8)
    lora_models.make_models(tmp_path)
    assert vocabulary() == 8


def test_a_class_that_fails_or_hangs_ends_only_itself(monkeypatch):
    def examine(name, worker):
        if name == "Hangs":
            time.sleep(60)
        return Examination(name) if name == "Lives" else {}[name]

    monkeypatch.setattr(sweep, "LONGEST", 1)
    monkeypatch.setattr(sweep, "examine", examine)
    told = {one.name: [f.what for f in one.findings] for one in sweep.sweep(["Fails", "Hangs", "Lives"])}
    assert told == {"Fails": ["KeyError('Fails')"], "Hangs": ["TooSlow('longer than 1 s')"], "Lives": []}


@pytest.mark.parametrize(("what", "code"), [(["lost"], 1), ([], 0)])
def test_the_sweep_ends_with_1_when_something_is_found_and_writes_it(monkeypatch, tmp_path, what, code):
    found = [Finding("A", "two_way", "file", text) for text in what]
    monkeypatch.setattr(sweep, "sweep", lambda names: [Examination(name, findings=found) for name in names])
    monkeypatch.setattr(sweep, "quiet", lambda: None)
    app = Typer()
    app.command()(sweep.main)
    answer = CliRunner().invoke(app, ["--only", "A", "--json", str(tmp_path / "found.json")])
    assert answer.exit_code == code
    [written] = json.loads((tmp_path / "found.json").read_text())
    assert [finding["what"] for finding in written["findings"]] == what
