"""`examples/papers/three_way.py`, the experiment on three-way tying, with a tiny model on made-up sentence pairs."""

import json
import random
import runpy
import shutil
import sys
from io import StringIO
from pathlib import Path

import pytest
import sacrebleu
import torch
from rich.console import Console
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_tying import TyingError, assert_tied

PAPERS = Path(__file__).parents[2] / "examples" / "papers"
SCRIPT = PAPERS / "three_way.py"
WORDS = {
    "a": "ein",
    "red": "roter",
    "big": "großer",
    "dog": "hund",
    "car": "wagen",
    "runs": "rennt",
    "sleeps": "schläft",
}
SCHEMES = ("none", "two_way", "three_way")
D_MODEL, STEPS = 16, 6


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PAPERS))
        yield runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Files of three splits; a translation is made word by word."""
    folder, random_words = tmp_path_factory.mktemp("text"), random.Random(0)
    flags = []
    for split, number in (("train", 24), ("validation", 12), ("test", 10)):
        pairs = [random_words.choices(list(WORDS), k=random_words.randint(2, 9)) for _ in range(number)]
        for side, suffix in (("source", "en"), ("target", "de")):
            file = folder / f"{split}.{suffix}"
            lines = [" ".join(words if side == "source" else [WORDS[w] for w in words]) for words in pairs]
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            flags += [f"--{split}_{side}_file", str(file)]
    return flags


def start(script, texts, folder, *flags) -> str:
    """What the script prints, run in this process."""
    sizes = {"vocab_size": 300, "max_length": 16, "d_model": D_MODEL, "layers": 1, "heads": 2, "ffn_dim": 16}
    training = {"max_steps": STEPS, "eval_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 8}
    training |= {"save_steps": 4, "save_total_limit": 2}
    others = {"warmup_steps": 2, "generation_num_beams": 2, "bleu_tokenize": "none", "disable_tqdm": True}
    values = {**sizes, **training, **others, "use_cpu": True, "output_dir": folder}
    argv = [str(SCRIPT), *texts, *(str(part) for key, value in values.items() for part in (f"--{key}", value))]
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*argv, *map(str, flags)])
        patch.setattr(sys, "stdout", printed)
        script["main"]()
    return printed.getvalue()


@pytest.fixture(scope="module")
def experiment(script, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "out"
    printed = start(script, texts, folder)
    return folder, printed, json.loads((folder / "report.json").read_text())


def test_the_trainer_is_told_that_the_model_takes_the_mean_itself(script, texts, tmp_path, given_to_trainer):
    assert given_to_trainer(start, script, texts, tmp_path / "out").accepts_loss_kwargs is False


def by_scheme(report) -> dict[str, dict]:
    return {result["scheme"]: result for result in report["results"]}


def test_each_scheme_has_the_parameters_that_its_ties_leave(experiment):
    folder, printed, report = experiment
    results, matrix = by_scheme(report), report["vocabulary"] * D_MODEL
    assert tuple(results) == SCHEMES
    assert [log["step"] for log in results["none"]["history"] if "eval_loss" in log] == [4, STEPS]
    untied = results["none"]["parameters"]
    assert [untied - results[scheme]["parameters"] for scheme in SCHEMES] == [0, matrix, 2 * matrix]
    for scheme in SCHEMES:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder / f"{scheme}-seed0")
        assert_tied(model)
        assert model.config.tying["scheme"] == scheme
        positions = sum(p.numel() for name, p in model.named_parameters() if "embed_positions" in name)
        assert sum(p.numel() for p in model.parameters()) - positions == results[scheme]["parameters"]
        assert results[scheme]["share"] == results[scheme]["parameters"] / untied
        assert f"{results[scheme]['parameters']:,}" in printed and f"{results[scheme]['share']:.1%}" in printed


def test_its_scores_are_those_of_the_saved_translations(experiment, texts):
    folder, printed, report = experiment
    references = Path(texts[texts.index("--test_target_file") + 1]).read_text(encoding="utf-8").splitlines()
    for scheme, result in by_scheme(report).items():
        lines = (folder / f"{scheme}-seed0" / "translations.txt").read_text(encoding="utf-8").splitlines()
        chrf = sacrebleu.corpus_chrf(lines, [references])
        assert result["bleu"]["score"] == sacrebleu.corpus_bleu(lines, [references], tokenize="none", force=True).score
        assert result["chrf"]["score"] == chrf.score
        assert "tok:none" in result["bleu"]["signature"] and result["bleu"]["signature"] in printed
    assert any(result["chrf"]["score"] > 0 for result in report["results"])  # so that there is something to compare


def test_the_saved_model_translates_as_it_did(experiment, texts):
    folder, _, _ = experiment
    folder = folder / "three_way-seed0"
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sources = Path(texts[texts.index("--test_source_file") + 1]).read_text(encoding="utf-8").splitlines()
    with torch.no_grad():
        inputs = tokenizer(sources, return_tensors="pt", padding=True, truncation=True, max_length=16)
        ids = model.generate(**inputs, num_beams=2, max_length=16)
    lines = [" ".join(line.split()) for line in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert lines == (folder / "translations.txt").read_text(encoding="utf-8").splitlines()


def test_all_schemes_see_the_same_batches_for_the_same_number_of_updates(experiment):
    _, _, report = experiment
    assert {result["updates"] for result in report["results"]} == {STEPS}
    assert len({(result["batches"], result["tokens"]) for result in report["results"]}) == 1


def test_they_start_from_the_same_values(script, experiment):
    folder, _, _ = experiment
    tokenizer = AutoTokenizer.from_pretrained(folder / "none-seed0")
    files = {name: "" for name in script["ExperimentArguments"].__dataclass_fields__ if name.endswith("_file")}
    arguments = script["ExperimentArguments"](**files, d_model=D_MODEL, layers=1, heads=2, ffn_dim=16)
    states = {s: script["make_model"](arguments, s, 3, tokenizer)[0].state_dict() for s in SCHEMES}
    embeddings = {"model.shared.weight", "model.encoder.embed_tokens.weight", "lm_head.weight"}
    for name, value in states["none"].items():
        if name not in embeddings:
            assert torch.equal(value, states["two_way"][name]) and torch.equal(value, states["three_way"][name]), name
    source = "model.encoder.embed_tokens.weight"
    assert torch.equal(states["none"][source], states["two_way"][source])
    assert states["none"]["lm_head.weight"].std().item() == pytest.approx(D_MODEL**-0.5, rel=0.05)


def test_the_default_sizes_have_the_ratio_of_the_paper(script, experiment):
    folder, _, _ = experiment
    tokenizer = AutoTokenizer.from_pretrained(folder / "none-seed0")
    files = {name: "" for name in script["ExperimentArguments"].__dataclass_fields__ if name.endswith("_file")}
    arguments = script["ExperimentArguments"](**files)
    tokenizer.add_tokens([f"word{i}" for i in range(arguments.vocab_size - len(tokenizer))])
    model, untied = script["make_model"](arguments, "three_way", 0, tokenizer)
    assert script["count_trained"](model) / untied == pytest.approx(80 / 168, abs=0.004)


def test_the_shares_of_the_roles_are_those_of_the_one_matrix(experiment):
    _, printed, report = experiment
    shares = {scheme: result["role_shares"] for scheme, result in by_scheme(report).items()}
    assert {scheme: set(roles) for scheme, roles in shares.items()} == {
        "none": set(),
        "two_way": {"target", "output"},
        "three_way": {"source", "target", "output"},
    }
    for scheme in ("two_way", "three_way"):
        assert sum(shares[scheme].values()) == pytest.approx(1)
        assert all(0 < share < 1 for share in shares[scheme].values())
    logged = [
        log["grad_share/embeddings/output"] for log in by_scheme(report)["three_way"]["history"] if "loss" in log
    ]
    assert len(logged) == STEPS // 2
    assert shares["three_way"]["output"] == pytest.approx(sum(logged) / len(logged))


def test_a_finished_run_is_kept_and_a_seed_added(script, texts, experiment):
    folder, _, before = experiment
    files = [file for file in folder.glob("*-seed0/*") if file.is_file()]
    written = {file: file.stat().st_mtime_ns for file in files}
    printed = start(script, texts, folder, "--schemes", "none", "--seeds", 0, 1)
    assert {file: file.stat().st_mtime_ns for file in files} == written
    first, second = json.loads((folder / "report.json").read_text())["results"]
    assert first == before["results"][0] and (second["scheme"], second["seed"]) == ("none", 1)
    assert first["batches"] != second["batches"]
    assert printed.count("Kept") == printed.count("Train ") == 1 and "mean" in printed
    assert (folder / "three_way.png").stat().st_size > 10_000


def test_a_run_that_broke_off_goes_on_to_the_same_end(script, texts, experiment):
    folder, _, before = experiment
    (folder / "two_way-seed0" / "result.json").unlink()
    shutil.rmtree(folder / "two_way-seed0" / f"checkpoint-{STEPS}")  # in the second epoch, with rows by length
    assert "Train" in start(script, texts, folder, "--schemes", "two_way", "--resume_from_checkpoint", "last")
    (again,) = json.loads((folder / "report.json").read_text())["results"]
    for key in ("batches", "validation_loss", "bleu", "chrf", "role_shares"):
        assert again[key] == before["results"][1][key], key


def test_a_run_with_other_settings_is_not_taken_for_this_one(script, texts, experiment):
    folder, _, _ = experiment
    with pytest.raises(TyingError, match=r"other settings \(learning_rate 0.0007, now 0.5\): give another"):
        start(script, texts, folder, "--learning_rate", 0.5)


def test_the_paired_test_tells_better_from_equal(script, tmp_path):
    references = [f"the number {i} stands before the number {i + 1} here" for i in range(60)]
    half = [["the number stands there", right][i % 2] for i, right in enumerate(references)]
    other_half = [["the number stands there", right][(i + 1) % 2] for i, right in enumerate(references)]
    texts = {"none": half, "three_way": references, "two_way": other_half, "source_target": half}
    folders, results = {}, []
    for scheme, lines in texts.items():
        folders[scheme, 7] = tmp_path / scheme
        folders[scheme, 7].mkdir()
        (folders[scheme, 7] / "translations.txt").write_text("".join(f"{line}\n" for line in lines))
        results.append({"scheme": scheme, "seed": 7})
    tests = {test["scheme"]: test for test in script["paired_tests"](results, folders, references, "none")}
    low = sacrebleu.corpus_bleu(texts["none"], [references], tokenize="none").score
    assert tests["three_way"]["difference"] == pytest.approx(100 - low) and tests["three_way"]["p_value"] < 0.01
    assert abs(tests["two_way"]["difference"]) < 0.5 and tests["two_way"]["p_value"] > 0.2
    assert tests["source_target"]["difference"] == 0 and tests["source_target"]["p_value"] == 1
    assert script["paired_tests"](results[1:], folders, references, "none") == []


def test_the_table_has_a_row_for_each_run_and_the_means(script):
    def result(scheme, seed, bleu):
        scores = {"score": bleu, "confidence": 0.5}
        return {"scheme": scheme, "seed": seed, "parameters": 1234, "share": 0.476, "updates": 10, "bleu": scores} | {
            "tokens_per_second": 100.0,
            "validation_loss": 2.0,
            "chrf": scores,
            "role_shares": {"source": 0.25},
        }

    results = [
        result("none", 0, 30.0),
        result("three_way", 0, 31.0),
        result("none", 1, 32.0),
        result("three_way", 1, 35.0),
    ]
    tests = [{"seed": seed, "scheme": "three_way", "difference": 1.0 + 2 * seed, "p_value": 0.01} for seed in (0, 1)]
    console = Console(width=200, file=StringIO())
    console.print(script["results_table"](results, tests))
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in console.file.getvalue().splitlines()
        if "│" in line
    ]
    assert [row[:2] + row[7:8] for row in rows] == [
        ["none", "0", "30.00 ± 0.50"],
        ["none", "1", "32.00 ± 0.50"],
        ["none", "mean", "31.00"],
        ["three_way", "0", "31.00 ± 0.50"],
        ["three_way", "1", "35.00 ± 0.50"],
        ["three_way", "mean", "33.00"],
    ]
    assert [row[9] for row in rows] == ["", "", "", "+1.00 (0.010)", "+3.00 (0.010)", "+2.00"]
    assert rows[3][2:4] == ["1,234", "47.6%"] and rows[3][10] == "source 25%"


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--schemes", "none", "four_way"), "--schemes has 'four_way': expected some of none, "),
        (("--schemes", "none", "none"), "--schemes is .* expected at least one, and each once"),
        (("--seeds", "1", "1"), "--seeds is .* each once"),
        (("--bleu_tokenize", "words"), "--bleu_tokenize is 'words': expected one of none, "),
        (("--heads", "3"), "--d_model 16 must be even and a multiple of --heads 3"),
        (("--test_source_file", "missing.en"), "missing.en"),
        (("--vocab_size", "100"), "vocabulary of 100 is too small"),
        (("--max_length", "1"), "At most 1 tokens"),
    ],
    ids=[
        "unknown scheme",
        "scheme twice",
        "seed twice",
        "tokenization",
        "heads",
        "missing file",
        "vocabulary",
        "length",
    ],
)
def test_bad_input_is_named_and_nothing_is_written(script, texts, tmp_path, flags, message):
    with pytest.raises(TyingError, match=message):
        start(script, texts, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_an_error_ends_the_script_with_its_message(script, texts, monkeypatch):
    swapped = [*texts[:-1], texts[1]]  # the last file has as many lines as the training text
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *swapped])
    with pytest.raises(SystemExit, match=r"^error: .* has 10 lines and .* has 24"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
