"""The scripts of the LSTM papers as a user runs them: the docstring's line, the results, bad input in one line."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from hf_tying import tying_report

from ..word_text import word_folder

PAPERS = Path(__file__).parents[2] / "examples" / "papers"
BENCHMARK = PAPERS.parent / "benchmarks" / "lstm.py"


@pytest.fixture
def run(as_script):
    return lambda script, *arguments: as_script(PAPERS / script, *arguments)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return word_folder(tmp_path_factory.mktemp("text"), sentences=300)


RUNS = {
    "small+wt+pr": ("press_wolf.py", "--variant", "small+wt+pr", "--pr_norm", "fro"),
    "small": ("press_wolf.py", "--variant", "small", "--loss", "stock"),
    "small real": ("inan.py", "--variant", "real", "--gamma", "0.5", "--temperature", "10"),
    "small al": ("inan.py", "--variant", "al", "--detach_target", "True"),
    "awd without averaging": (
        *("awd_lstm.py", "--hidden_size", "16", "--embedding_size", "8", "--batch_size", "3"),
        *("--without", "averaging"),
    ),
}


@pytest.mark.parametrize("variant", RUNS)
def test_a_script_trains_and_reports(variant, text, tmp_path, run):
    script, *flags = RUNS[variant]
    done = run(script, "--data_dir", text, "--epochs", 1, "--seed", 3, "--output_dir", tmp_path, "--use_cpu", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["variant"] == variant and results["seed"] == 3 and results["epochs"] == 1
    for name in ("train_perplexity", "valid_perplexity", "test_perplexity"):
        assert 1 < results[name] < 200
    assert results["tokens_per_second"] > 0 and results["minutes"] > 0 and results["vocabulary"] == 31
    assert results["published"] and "published" in done.stdout
    report = tying_report(tmp_path)  # a model that anybody can load, tied as the variant says
    tied = variant not in ("small", "small al")
    assert (report.to_dict()["scheme"] == "two_way") is tied
    expected = {"small+wt+pr": 31 * 200 + 2 * 320_800 + 31 + 40_200, "small": 2 * 31 * 200 + 2 * 320_800 + 31}
    expected |= {"small real": 31 * 200 + 641_600, "small al": 2 * 31 * 200 + 641_600 + 31}
    assert results["parameters"] == expected.get(variant, results["parameters"])


def test_a_run_goes_on_from_its_last_checkpoint(text, tmp_path, run):
    flags = ("--data_dir", text, "--variant", "small+wt", "--output_dir", tmp_path, "--use_cpu")
    assert run("press_wolf.py", *flags, "--epochs", 1).returncode == 0
    done = run("press_wolf.py", *flags, "--epochs", 2, "--resume_from_checkpoint", "last")
    assert done.returncode == 0, done.stderr[-3000:]
    whole = run("press_wolf.py", *flags[:-2], f"{tmp_path}/whole", "--use_cpu", "--epochs", 2)
    assert whole.returncode == 0
    resumed, straight = (json.loads((f / "results.json").read_text()) for f in (tmp_path, tmp_path / "whole"))
    assert resumed["test_perplexity"] == straight["test_perplexity"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"valid.txt": None}, "There is no file"),
        ({"test.txt": ""}, "is empty"),
        ({"train.txt": "word"}, "nothing to learn"),
        ({"train.txt": "a b c\nb c a\n"}, "smaller batch or fewer steps"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(text, tmp_path, run, files, message):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train.txt", "valid.txt", "test.txt"):
        content = files.get(name, (text / name).read_text())
        if content is not None:
            (folder / name).write_text(content)
    done = run("press_wolf.py", "--data_dir", folder, "--epochs", 1, "--output_dir", tmp_path / "out", "--use_cpu")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not (tmp_path / "out").exists()


def test_unknown_parts_are_refused(text, tmp_path, run):
    done = run("awd_lstm.py", "--data_dir", text, "--without", "dropout", "--output_dir", tmp_path)
    assert done.returncode == 1 and "expected some of averaging" in done.stderr


def test_classifier_first_beside_plain_training(text, tmp_path, run):
    flags = ("--epochs", 3, "--hidden_size", 12, "--stages", 3, "--use_cpu", "--seed", 1)
    done = run("cascade.py", "--data_dir", text, "--output_dir", tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for name in ("plain", "cascade"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        found[name] = [log["eval_perplexity"] for log in results["epoch_perplexities"] if "eval_perplexity" in log]
        assert len(found[name]) == 3 + 2  # after each epoch, and of both texts at the end
    assert found["plain"][0] == found["cascade"][0] and found["plain"][1] != found["cascade"][1]
    assert (tmp_path / "cascade.png").stat().st_size > 5000


def test_the_benchmark_compares_the_same_work(tmp_path, run):
    done = run(BENCHMARK, "--quick", "--vocabulary", 300, "--json", tmp_path / "lstm.json")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "lstm.json").read_text())["results"]
    assert [*found] == ["bare", "trainer", "trainer, tied softmax"] and found["bare"]["ratio"] == 1
    assert all(result["words_per_second"] > 0 for result in found.values())


# --- the theory of Inan et al. ---------------------------------------------------------------------------------------


@pytest.fixture
def theory(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPERS))
    return importlib.import_module("inan_theory")


def test_the_distance_of_subspaces(theory):
    torch.manual_seed(0)
    basis = torch.randn(60, 5)
    assert theory.subspace_distance(basis @ torch.randn(5, 4), basis) < 1e-6
    shifted = basis @ torch.randn(5, 4) + torch.randn(4)  # one number for all words, in each column
    assert theory.subspace_distance(shifted, basis) < 1e-6 < 0.1 < theory.subspace_distance(shifted, basis, False)
    outside = torch.linalg.qr(torch.cat([torch.ones(60, 1), basis, torch.randn(60, 3)], 1)).Q[:, 6:]
    assert theory.subspace_distance(outside, basis) == pytest.approx(1.0, abs=1e-6)
    half = outside[:, :1] + torch.linalg.qr(basis - basis.mean(0)).Q[:, :1]
    assert theory.subspace_distance(half, basis) == pytest.approx(0.5**0.5, abs=1e-5)


def test_the_softmax_matrix_comes_nearer_to_the_embedding_by_the_augmented_loss_alone(text, tmp_path, run):
    flags = ("--tokens", 900, "--hidden_size", 12, "--epochs", 3, "--betas", 0, 1, "--learning_rate", 0.1)
    done = run("inan_theory.py", "--data_dir", text, "--output_dir", tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    zero, one = (entry["distance"] for entry in results["runs"])
    assert one < 0.5 * zero and (tmp_path / "theory.png").stat().st_size > 5000
    done = run("inan_theory.py", "--data_dir", text, "--output_dir", tmp_path, "--betas", 2)
    assert done.returncode == 1 and "each from 0 to 1" in done.stderr


@pytest.mark.parametrize(
    "script", [PAPERS / "cascade.py", PAPERS.parent / "run_ulmfit.py"], ids=lambda path: path.name
)
def test_a_script_of_one_process_refuses_several_before_any_work(script, text, tmp_path, as_script, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    data = (
        ("--data_dir", text) if script.name == "cascade.py" else ("--no_pretrain", "--train_file", text / "train.txt")
    )
    done = as_script(script, *data, "--output_dir", tmp_path / "out")
    assert done.returncode == 1 and "error: Started as 2 processes: expected one" in done.stderr
    assert not (tmp_path / "out").exists()
