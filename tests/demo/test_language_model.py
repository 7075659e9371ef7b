"""The demo's parts, and the demo from the command line on a small text."""

import json
import re
import shlex
import shutil
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_tying import TyingError, assert_tied, cli, untie
from hf_tying.cli.demo import demo
from hf_tying.demo import job
from hf_tying.demo.fresh_process import score
from hf_tying.demo.job import _fairness, _outcome
from hf_tying.demo.models import build_pair, differing_at_the_start, small_config
from hf_tying.demo.proof import _reload_check, reload_checks
from hf_tying.demo.report import comparison_table
from hf_tying.demo.settings import DemoSettings
from hf_tying.demo.training import Run, _RecordingCollator

from ..processes import run_python


def hf_tying(*arguments, cwd):
    return run_python("-m", "hf_tying", *arguments, check=False, cwd=cwd)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sentences of a small grammar: some regularity to learn, no paragraph twice."""
    generator = torch.Generator().manual_seed(0)

    def word(kind):
        return f"{kind}{torch.randint(40, (1,), generator=generator).item()}"

    sentences = [f"The {word('noun')} {word('verb')} the {word('noun')} of {word('noun')}." for _ in range(1500)]
    path = tmp_path_factory.mktemp("text") / "grammar.txt"
    path.write_text("\n\n".join(" ".join(sentences[i : i + 5]) for i in range(0, len(sentences), 5)))
    return path


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The example of the help, run once as a user runs it, with a smaller vocabulary and fewer steps."""
    here = tmp_path_factory.mktemp("example")
    (here / "train.txt").symlink_to(text)
    command = shlex.split(re.search(r"Example: hf-tying (.+)", demo.__doc__)[1])
    assert command[0] == "demo" and command[-2] == "--output_dir"
    flags = ["--vocab_size", 400, "--max_steps", 12, "--seed", 3]
    return hf_tying(*command, *flags, cwd=here), here / command[-1]


@pytest.mark.slow
def test_the_exit_status_is_zero_exactly_if_every_claim_holds(finished):
    result, folder = finished
    report = json.loads((folder / "report.json").read_text())
    assert result.returncode == (0 if all(check["holds"] for check in report["checks"]) else 1), result.stderr
    failed = [check["claim"] for check in report["checks"] if not check["holds"]]
    assert len(report["checks"]) == 8
    # A dozen steps say nothing about perplexity; everything else must hold at any length.
    assert all("perplexity" in claim for claim in failed), failed


@pytest.mark.slow
def test_the_report_has_what_programs_need(finished):
    _, folder = finished
    report = json.loads((folder / "report.json").read_text())
    untied, tied = report["untied"], report["tied"]
    assert untied["parameters"] - tied["parameters"] == report["corpus"]["vocabulary"] * 128
    assert untied["checkpoint_bytes"] > tied["checkpoint_bytes"] == (folder / "tied/model.safetensors").stat().st_size
    # Two moments in float32 for each parameter, and one float32 step count for each tensor.
    assert 0 <= tied["optimizer_bytes"] - 8 * tied["parameters"] < 4 * 100
    assert report["tokens"] == 12 * 4 * 128 and report["seed"] == 3 and report["complete"]
    assert tied["tokens_per_second"] > 0 and 1 < tied["perplexity"] < report["corpus"]["vocabulary"]
    assert {"python", "torch", "transformers"} <= report["versions"].keys()
    assert any("eval_loss" in log for log in report["history"]["tied"])


@pytest.mark.slow
def test_the_output_is_a_table_a_sample_and_a_way_to_go_on(finished):
    result, _ = finished
    for expected in ("validation perplexity", "two_way / untied", "Sample", "holds", "--train_file"):
        assert expected in result.stdout
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr


@pytest.mark.slow
def test_the_saved_models_load_and_the_picture_is_one(finished):
    _, folder = finished
    tied = AutoModelForCausalLM.from_pretrained(folder / "tied")
    untied = AutoModelForCausalLM.from_pretrained(folder / "untied")
    assert_tied(tied)
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    assert untied.get_input_embeddings().weight is not untied.get_output_embeddings().weight
    assert len(AutoTokenizer.from_pretrained(folder / "tied")) == tied.config.vocab_size
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_file_that_is_changed_untied_or_missing_is_found_by_the_reload(finished, tmp_path):
    _, folder = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "tied")
    blocks = torch.randint(model.config.vocab_size, (3, 32), generator=torch.Generator().manual_seed(0))
    in_memory = score(model, blocks)

    shutil.copytree(folder / "tied", tmp_path / "changed")
    weights = load_file(folder / "tied" / "model.safetensors")
    weights["model.embed_tokens.weight"][5] += 0.1
    save_file(weights, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
    assert [check.holds for check in reload_checks(tmp_path / "changed", in_memory, blocks)] == [False, False]

    untie(model).save_pretrained(tmp_path / "untied")  # right values, no tie
    AutoTokenizer.from_pretrained(folder / "tied").save_pretrained(tmp_path / "untied")
    assert not _reload_check("it is tied", tmp_path / "untied", in_memory, blocks, "hf_tying").holds

    missing = _reload_check("it loads", tmp_path / "missing", in_memory, blocks)
    assert not missing.holds and "the process ended with 1" in missing.evidence


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "gemma3_text", "opt", "falcon", "mamba", "gpt_neox"])
def test_the_pair_differs_in_the_output_matrix_alone(model_type):
    untied, tied = build_pair(small_config(model_type, vocab_size=300, block_size=32), "two_way", seed=1)
    assert differing_at_the_start(untied, tied) == []
    assert_tied(tied)
    head, embedding = untied.get_output_embeddings().weight, untied.get_input_embeddings().weight
    assert not torch.equal(head, embedding)
    saved = untied.num_parameters() - tied.num_parameters()
    bias = embedding.shape[0] if model_type == "bert" else 0  # BERT holds its output bias twice, and ties that too
    assert saved == embedding.numel() + bias
    assert torch.equal(tied.get_output_embeddings().weight, embedding)


def test_a_pair_that_starts_apart_is_found():
    untied, tied = build_pair(small_config("llama", vocab_size=300, block_size=32), "two_way", seed=1)
    with torch.no_grad():
        tied.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert differing_at_the_start(untied, tied) == ["model.layers.1.mlp.up_proj.weight"]


def test_each_claim_about_the_outcome_can_fail():
    untied = {"parameters": 10, "checkpoint_bytes": 10, "perplexity": 100.0}
    assert all(check.holds for check in _outcome({"untied": untied, "tied": untied | dict.fromkeys(untied, 9)}))
    worse = {"parameters": 10, "checkpoint_bytes": 10, "perplexity": 102.1}
    assert not any(check.holds for check in _outcome({"untied": untied, "tied": worse}))


def test_a_claim_that_fails_ends_the_command_with_one_and_is_reported(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "MOST_PERPLEXITY_RATIO", 0)
    monkeypatch.setattr(job, "reload_checks", lambda *arguments: [])
    flags = [
        "--train_file",
        str(text),
        "--vocab_size",
        "300",
        "--max_steps",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", ["hf-tying", "demo", "--json", *flags])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert "FAILS  its perplexity is at most 0 of the untied model's" in printed.err
    told = json.loads(printed.out)
    assert (told["schema"], told["command"], told["source"]) == (1, "demo", str(tmp_path / "out"))
    assert [finding["code"] for finding in told["findings"]] == ["claim"]
    assert told["findings"][0]["message"].startswith("its perplexity is at most 0 of the untied model's: it does not")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert told["report"] == report
    assert [check["claim"] for check in report["checks"] if not check["holds"]] == [
        "its perplexity is at most 0 of the untied model's"
    ]


def test_other_data_or_another_order_is_found():
    one, two = {"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4], "labels": [3, 4]}
    digests = []
    for batches in ([[one], [two]], [[one], [two]], [[two], [one]], [[one]]):
        collator = _RecordingCollator()
        for batch in batches:
            collator(batch)
        digests.append(collator.digest.hexdigest())
    assert digests[0] == digests[1] and len(set(digests)) == 3
    untied, other = (Run(None, 8, 1.0, 1, 1.0, data, []) for data in (digests[0], digests[2]))
    assert [check.holds for check in _fairness(untied, untied, [])] == [True, True]
    assert [check.holds for check in _fairness(untied, other, ["a.weight"])] == [False, False]


def test_the_table_shows_numbers_and_their_ratio():
    untied = dict(parameters=2000, checkpoint_bytes=8e6, optimizer_bytes=16e6, tokens_per_second=900, perplexity=50.0)
    tied = dict(parameters=1000, checkpoint_bytes=4e6, optimizer_bytes=8e6, tokens_per_second=990, perplexity=48.0)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(comparison_table(untied, tied, "two_way"))
    table = console.export_text()
    for expected in ("2,000", "1,000", "0.500", "8.00 MB", "1.100", "48.00", "0.960"):
        assert expected in table


def test_a_missing_library_is_named_before_anything_is_done(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(job, "standard_library_corpus", lambda: pytest.fail("the text was read"))
    with pytest.raises(TyingError, match=r"matplotlib, which is missing: pip install 'hf-tying\[demo\]'"):
        job.run_demo(DemoSettings(output_dir=tmp_path / "out"))


@pytest.mark.parametrize("library", ["accelerate", "datasets"])
def test_a_dependency_that_was_left_out_is_named(library, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(job, "run_demo", lambda settings: pytest.fail("the demo was started"))
    monkeypatch.setattr(sys, "argv", ["hf-tying", "demo"])
    with pytest.raises(SystemExit, match="3"):
        cli.main()
    assert f"The demo needs {library}, which is missing: pip install 'hf-tying[demo]'." in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--train_file", "{tmp}/missing.txt"], "There is no file"),
        (["--train_file", "{tmp}/empty.txt"], "is empty"),
        (["--train_file", "{tmp}/short.txt"], "less than one block of 128"),
        (["--train_file", "{tmp}/latin.txt"], "is not UTF-8"),
        (["--model_type", "lama"], "Unknown model type 'lama'"),
        (["--scheme", "two-way"], "Unknown tying scheme 'two-way'"),
        (["--scheme", "none"], "nothing to compare"),
        (["--scheme", "three_way", "--train_file", "{text}", "--vocab_size", "300"], "three_way"),
        (["--vocab_size", "12", "--train_file", "{text}"], "at least 257"),
        (["--max_steps", "0"], "steps is 0"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_bad_input_is_a_message_and_nothing_is_written(flags, message, text, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("A few words. " * 10)
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1") * 100)
    before = sorted(tmp_path.iterdir())
    flags = [flag.format(tmp=tmp_path, text=text) for flag in flags]
    monkeypatch.setattr(sys, "argv", ["hf-tying", "demo", *flags, "--json", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 3
    printed = capsys.readouterr()
    assert message in printed.err and message in json.loads(printed.out)["findings"][0]["message"]
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_with_other_files_is_not_written_into(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(TyingError, match="holds files that no demo wrote"):
        DemoSettings(output_dir=tmp_path)
    with pytest.raises(TyingError, match="is a file"):
        DemoSettings(output_dir=tmp_path / "thesis.tex" / "runs")


@pytest.mark.parametrize(
    "model_type, reason",
    [
        ("git", "expected at most 20,000,000"),
        ("xlnet", "no sequence length limit"),
        ("bart", "asks for more than sizes and token ids"),
    ],
)
def test_a_model_that_the_demo_cannot_train_is_refused_by_name(model_type, reason):
    with pytest.raises(TyingError, match=f"{model_type}.*{reason}"):
        build_pair(small_config(model_type, vocab_size=300, block_size=32), "two_way", seed=0)
