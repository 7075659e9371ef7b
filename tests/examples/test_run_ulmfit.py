"""`run_ulmfit.py` as a user runs it: three folders, figures, each part without it, a stop, bad input in one line."""

import csv
import importlib
import json
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    pipeline,
)

from hf_tying import TyingError

SCRIPT = Path(__file__).parents[2] / "examples" / "run_ulmfit.py"
KINDS = {"animal": ["cat", "dog", "owl"], "tool": ["saw", "axe", "pen"], "food": ["rice", "soup", "bread"]}
SMALL = (
    *(
        "--embedding_size",
        "12",
        "--hidden_size",
        "16",
        "--pretrain_epochs",
        "1",
        "--tune_epochs",
        "1",
        "--epochs",
        "8",
    ),
    *("--lm_batch_size", "4", "--bptt", "20", "--batch_size", "16", "--learning_rate", "0.03", "--use_cpu"),
    *("--dropout", "0"),
)
QUICK = ("--epochs", "1", "--no_lm_tuning")


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    kinds = [kind for kind in KINDS for _ in range(count // len(KINDS))]
    draw.shuffle(kinds)
    filler = ["the", "old", "red", "was", "there", "and", "so", "on"]
    return [
        (" ".join([*draw.sample(filler, 4), draw.choice(KINDS[kind]), *draw.sample(filler, 3)]), kind)
        for kind in kinds
    ]


def table(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    general = [f"{text} , she said ." for text, kind in sentences(150, 0) if kind != "food"]  # food has new words
    (folder / "wiki.txt").write_text("\n".join(general) + "\n", encoding="utf-8")
    table(folder / "train.csv", sentences(150, 1))
    table(folder / "valid.csv", sentences(30, 2))
    table(folder / "test.csv", sentences(30, 3))
    return folder


@pytest.fixture(scope="module")
def run(files):
    def run(out: Path, *flags) -> dict:
        given = ["--pretrain_file", files / "wiki.txt", "--train_file", files / "train.csv"]
        given += ["--validation_file", files / "valid.csv", "--test_file", files / "test.csv"]
        arguments = [*given, *SMALL, "--text_column", "text", "--label_column", "label", *flags, "--output_dir", out]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
            patch.syspath_prepend(str(SCRIPT.parent))
            runpy.run_path(str(SCRIPT))["main"]()
        return json.loads((out / "results.json").read_text(encoding="utf-8"))

    return run


@pytest.fixture(scope="module")
def out(run, tmp_path_factory):
    """A whole run."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(folder)
    return folder


def figures(results: dict) -> dict:
    """What is measured, without the flags and the times."""
    return {name: value for name, value in results.items() if name != "settings"}


def test_three_stages_leave_three_models_and_the_figures(out):
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for split, texts in (("train", 150), ("validation", 30), ("test", 30)):
        assert results[split]["texts"] == texts
        assert results[split]["accuracy"] > 0.8 and results[split]["macro_f1"] > 0.8
        assert 0 <= results[split]["ece"] <= 1
    assert results["validation"]["ece"] != results["validation"]["ece_before"]
    for name in ("lm", "lm_tuned"):
        model = AutoModelForCausalLM.from_pretrained(out / name)
        assert model.lm_head.weight is model.lstm.embed_tokens.weight
        assert len(AutoTokenizer.from_pretrained(out / name)) == model.config.vocab_size
        assert results["stages"][name]["perplexity"] < model.config.vocab_size
    general, tuned = (AutoTokenizer.from_pretrained(out / name).get_vocab() for name in ("lm", "lm_tuned"))
    assert {*tuned} - {*general} == {*KINDS["food"]} and {word: tuned[word] for word in general} == general
    assert not list(out.glob("*/checkpoints"))
    assert (out / "confusion_matrix.png").stat().st_size > 1000 and (out / "reliability.png").stat().st_size > 1000


def test_the_classifier_is_what_the_pipeline_and_the_figures_say(out, files):
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    classify = pipeline("text-classification", model=str(out / "classifier"), device="cpu")
    with (files / "test.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = [row["label"] for row in classify([row["text"] for row in rows], batch_size=7)]
    right = sum(label == row["label"] for label, row in zip(found, rows, strict=True))
    assert right / len(rows) == pytest.approx(results["test"]["accuracy"])
    model = AutoModelForSequenceClassification.from_pretrained(out / "classifier")
    assert model.config.temperature == pytest.approx(results["temperature"]["forward"])
    assert model.config.id2label == {0: "animal", 1: "food", 2: "tool"}


@pytest.mark.parametrize("stage", ["lm", "lm_tuned", "classifier"])
def test_a_stage_goes_on_after_a_stop_with_the_same_numbers(stage, out, run, tmp_path, monkeypatch):
    whole, steps = json.loads((out / "results.json").read_text(encoding="utf-8")), []
    step = Trainer.training_step

    def stopped(self, *args, **kwargs):
        if Path(self.args.output_dir).parent.name == stage:
            steps.append(self.state.global_step)
            if len(steps) > 7:
                raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", "--save_steps", "3")
    assert list((tmp_path / "out" / stage / "checkpoints").glob("checkpoint-*"))
    patched = []
    monkeypatch.setattr(
        Trainer, "training_step", lambda self, *a, **k: patched.append(self.state.global_step) or step(self, *a, **k)
    )
    results = run(tmp_path / "out", "--save_steps", "3", "--resume_from_checkpoint", "last")
    assert results["settings"] == whole["settings"] | {"save_steps": 3, "output_dir": str(tmp_path / "out")}
    assert patched[0] == 6  # not from the beginning
    assert figures(results) == figures(whole)
    patched.clear()
    assert figures(run(tmp_path / "out", "--save_steps", "3")) == figures(whole) and not patched  # nothing is repeated


def test_the_first_stage_of_another_run_may_be_taken(out, files, monkeypatch, tmp_path):
    arguments = ["--train_file", files / "train.csv", *SMALL, *QUICK, "--output_dir", tmp_path / "out"]
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    main = runpy.run_path(str(SCRIPT))["main"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments), "--pretrained_lm", str(out / "lm")])
    main()
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder / "lm").state_dict() for folder in (out, tmp_path / "out")
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for flags, message in ((["--pretrained_lm", "none"], "no config.json"), ([], "Expected --pretrain_file or")):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments[:-1]), str(tmp_path / "b"), *flags])
        with pytest.raises(TyingError, match=message):
            main()
    assert not (tmp_path / "b").exists()


def test_only_an_lstm_is_taken_as_the_first_stage(files, out, monkeypatch, tmp_path):
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=20, n_embd=4, n_layer=1, n_head=1)
    ).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(out / "lm").save_pretrained(tmp_path / "gpt2")
    arguments = ["--train_file", files / "train.csv", *SMALL, *QUICK, "--output_dir", tmp_path / "out"]
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments), "--pretrained_lm", f"{tmp_path}/gpt2/"])
    with pytest.raises(TyingError, match="is a GPT2LMHeadModel: expected a TiedLSTMForCausalLM"):
        runpy.run_path(str(SCRIPT))["main"]()


def test_a_folder_without_a_checkpoint_takes_other_settings(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    stage = importlib.import_module("ulmfit_stage").Stage
    stage(tmp_path, {"rate": 1})
    begun = stage(tmp_path, {"rate": 2})
    Path(begun.checkpoints, "checkpoint-3").mkdir(parents=True)
    Path(begun.checkpoints, "checkpoint-3", "trainer_state.json").write_text("{}")
    monkeypatch.setattr(stage, "last_checkpoint", lambda self: "checkpoint-3")
    with pytest.raises(TyingError, match=r"rate \(2, now 1\)"):
        stage(tmp_path, {"rate": 1})
    monkeypatch.undo()
    begun.finish(loss=0)
    with pytest.raises(TyingError, match=r"rate \(2, now 1\)"):
        stage(tmp_path, {"rate": 1})
    assert stage(tmp_path, {"rate": 2}).figures == {"loss": 0} and not Path(begun.checkpoints).exists()


def test_the_benchmark_leaves_each_part_out_and_shares_the_first_stage(monkeypatch, tmp_path, capsys):
    benchmark = runpy.run_path(str(SCRIPT.parent / "benchmarks" / "ulmfit.py"))
    calls, parts = [], dict.fromkeys(("accuracy", "macro_f1", "ece", "ece_before"), 0.75)

    def run(flags, output):
        calls.append(flags)
        return {"test": parts, "minutes": 1.0}

    monkeypatch.setitem(benchmark["main"].__globals__, "run", run)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    flags = ["--pretrain_file", "w.txt", "--train_file", "a.csv", "--test_file", "b.csv", "--seeds", "3", "4"]
    monkeypatch.setattr(sys, "argv", ["ulmfit.py", *flags, "--json", str(tmp_path / "a.json")])
    benchmark["main"]()
    assert "--pretrain_file" in calls[0] and not any("--pretrain_file" in call for call in calls[1:])
    assert len(calls) == 1 + 2 * len(benchmark["VARIANTS"])
    for call in calls[1:]:
        assert ("--pretrained_lm" in call) != ("--no_pretrain" in call) and "--test_file" in call
    runs = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert {(run["variant"], run["seed"]) for run in runs} == {(v, s) for v in benchmark["VARIANTS"] for s in (3, 4)}
    assert "25.00" in capsys.readouterr().out


def test_a_folder_of_other_settings_is_refused(out, run):
    with pytest.raises(TyingError, match=r"epochs \(8.0, now 9.0\).*another --output_dir"):
        run(out, "--epochs", "9")


@pytest.mark.parametrize(
    "flags",
    [
        {"no_pretrain", "no_slanted_triangular", "no_concat_pooling", "no_calibration"},
        {"no_lm_tuning", "no_discriminative_rates", "no_gradual_unfreezing", "no_tying"},
    ],
)
def test_each_part_may_be_left_out(flags, run, tmp_path):
    seen = {"trained": [], "rates": []}
    step = Trainer.training_step

    def watch(self, model, *args, **kwargs):
        if Path(self.args.output_dir).parent.name == "classifier":
            seen["trained"].append(model.lstm.embed_tokens.weight.requires_grad)
            seen["rates"].append([group["lr"] for group in self.optimizer.param_groups])
        return step(self, model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", watch)
        results = run(tmp_path / "out", "--epochs", "4", *(f"--{flag}" for flag in flags))
    assert 0 <= results["test"]["accuracy"] <= 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "lm_tuned")
    assert (model.lm_head.weight is model.lstm.embed_tokens.weight) == ("no_tying" not in flags)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "classifier")
    width = model.config.layer_widths[-1]
    assert classifier.classifier[0].num_features == width * (1 if "no_concat_pooling" in flags else 3)
    assert (classifier.config.temperature == 1) == ("no_calibration" in flags)
    assert ("perplexity" in results["stages"]["lm"]) == ("no_pretrain" not in flags)
    assert ("perplexity" in results["stages"]["lm_tuned"]) == ("no_lm_tuning" not in flags)
    assert seen["trained"][0] == ("no_gradual_unfreezing" in flags) and seen["trained"][-1]
    assert (len(set(seen["rates"][0])) == 1) == ("no_discriminative_rates" in flags)
    assert (seen["rates"][0] == seen["rates"][-1]) == ("no_slanted_triangular" in flags)


def test_both_directions_soft_labels_and_more_rounds(run, files, tmp_path):
    table(tmp_path / "more.csv", sentences(30, 4))
    results = run(
        tmp_path / "out", *QUICK, "--epochs", "4", "--bidirectional", "--label_smoothing", "0.1",
        "--self_distillation", "2", "--unlabeled_file", tmp_path / "more.csv", "--pseudo_labels", "0.2",
    )  # fmt: skip
    assert {"forward", "backward"} <= set(results["test"]) and set(results["temperature"]) == {"forward", "backward"}
    models = {path.parent.name for path in (tmp_path / "out").glob("*/config.json")}
    rounds = {f"classifier{way}{number}" for way in ("", "_backward") for number in ("", "_round_1", "_round_2")}
    assert models == rounds | {"lm", "lm_tuned", "lm_backward", "lm_tuned_backward"}
    assert results["stages"]["classifier_round_1"]["texts"] == 150
    assert results["stages"]["classifier"]["texts"] == 180  # with those that the model is sure of
    backward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "classifier_backward")
    assert backward.config.reads_backward


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_long_texts_in_overlapping_pieces(pooling, run, files, tmp_path):
    long = [(" ".join([text] * 4), kind) for text, kind in sentences(60, 5)]
    table(tmp_path / "long.csv", long)
    flags = ("--chunk", "12", "--overlap", "4", "--chunk_pooling", pooling)
    results = run(tmp_path / "out", *QUICK, *flags, "--train_file", tmp_path / "long.csv", "--no_pretrain")
    assert results["train"]["texts"] == 60 and results["test"]["texts"] == 30


def test_texts_of_several_classes_without_a_validation_file(files, run, tmp_path):
    rows = [(f"{a} {b}", f"{x};{y}") for (a, x), (b, y) in zip(sentences(60, 6), sentences(60, 7), strict=True)]
    table(tmp_path / "several.csv", [*rows, ("the old red", "")])
    arguments = ["--train_file", tmp_path / "several.csv", "--no_pretrain", *SMALL, *QUICK, "--label_separator", ";"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments), "--output_dir", str(tmp_path / "out")])
        patch.syspath_prepend(str(SCRIPT.parent))
        runpy.run_path(str(SCRIPT))["main"]()
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["train"]["texts"] == 55 and results["validation"]["texts"] == 6 and "test" not in results
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "classifier")
    assert model.config.problem_type == "multi_label_classification"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "classifier")
    assert model(**tokenizer(["the cat"], return_tensors="pt")).logits.shape == (1, 3)
    assert torch.isfinite(torch.tensor(results["train"]["macro_f1"]))


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([("a cat", "animal"), ("a dog", "animal")], (), "one class only"),
        ([("a cat", "animal"), ("", "tool")], (), "row 2: the text is ''"),
        ([("a cat", "animal"), ("a saw", "nan")], (), "row 2: the label is 'nan'"),
        ([("a cat", "animal"), ("a saw", "tol")], (), "the label 'food' is not in the training file"),
        (sentences(6, 0), ("--text_column", "words"), "no column 'words'"),
        (sentences(6, 0), ("--pretrain_file", "none.txt"), "There is no file 'none.txt'"),
        (sentences(6, 0), ("--chunk", "8", "--overlap", "8"), "fewer words shared"),
        (sentences(6, 0), ("--pseudo_labels", "0.9"), "--unlabeled_file"),
        (sentences(6, 0), ("--label_smoothing", "1"), "a share in"),
        (sentences(6, 0), ("--epochs", "0"), "more than 0"),
        (
            sentences(6, 0),
            ("--no_pretraining",),
            "Unknown flag --no_pretraining; the nearest names are .*--no_pretrain",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(rows, flags, message, run, tmp_path):
    with pytest.raises(TyingError, match=message) as error:
        run(tmp_path / "out", "--train_file", table(tmp_path / "train.csv", rows), *flags)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
