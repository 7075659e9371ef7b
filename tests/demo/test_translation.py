"""The translation demo's parts, and the demo from the command line on few pairs and few steps."""

import functools
import hashlib
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainer
from transformers.utils import logging

from hf_tying import TyingError, assert_tied, cli
from hf_tying.data.parallel import ParallelCorpus
from hf_tying.data.tokenizers import joint_tokenizer
from hf_tying.demo.models import differing_at_the_start
from hf_tying.demo.settings import TranslationSettings
from hf_tying.demo.translation import corpus as corpus_module
from hf_tying.demo.translation import job, proof
from hf_tying.demo.translation.corpus import prepared_corpora
from hf_tying.demo.translation.models import build_models, small_config
from hf_tying.demo.translation.proof import bleu_check, outcome_checks, reload_checks, start_check, success_check
from hf_tying.demo.translation.training import TranslationRun, _RecordingTrainer, training_order, translated
from hf_tying.ties.anatomy import roles
from hf_tying.ties.slots import find_parameter

NAMES = ("untied", "two_way", "three_way")
STEPS = 6
OWN = ("--train_file", "{pairs}", "--source_lang", "xx", "--target_lang", "yy")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A hundred and twenty pairs as JSON lines: words of one language, and the same words backwards."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("text") / "pairs.jsonl"
    with path.open("w") as file:
        for i in range(120):
            words = [f"w{n}" for n in torch.randint(100, (3,), generator=generator).tolist()] + [str(i)]
            file.write(json.dumps({"translation": {"xx": " ".join(words), "yy": " ".join(words[::-1])}}) + "\n")
    return path


def demo(*flags) -> int:
    """The command line in this process, which has everything imported; its exit status."""
    verbosity = logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hf-tying", "demo", "--task", "translation", *map(str, flags)])
        try:
            with pytest.raises(SystemExit) as end:
                cli.main()
        finally:
            logging.set_verbosity(verbosity)
    return end.value.code


@pytest.fixture(scope="module")
def finished(pairs, tmp_path_factory):
    """The demo, run once: exit status, folder, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    flags = ["--train_file", pairs, "--source_lang", "xx", "--target_lang", "yy", "--max_steps", STEPS]
    printed = tmp_path_factory.mktemp("out") / "printed.txt"
    with printed.open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        status = demo(*flags, "--seed", 3, "--vocab_size", 400, "--output_dir", folder)
    return status, folder, printed.read_text()


@pytest.mark.slow
def test_every_claim_holds_at_any_length_and_the_exit_status_is_zero(finished):
    status, folder, printed = finished
    checks = json.loads((folder / "report.json").read_text())["checks"]
    assert len(checks) == 7  # on text of one's own no score is claimed
    failed = [check["claim"] for check in checks if not check["holds"]]
    assert status == 0 and not failed, failed
    assert printed.count("holds  ") == 7


@pytest.mark.slow
def test_the_report_has_what_programs_need(finished):
    _, folder, _ = finished
    report = json.loads((folder / "report.json").read_text())
    matrix = report["corpus"]["vocabulary"] * 128
    assert report["corpus"]["vocabulary"] == 400
    assert report["corpus"]["training_pairs"] + report["corpus"]["validation_pairs"] <= 120
    for more, less in (("untied", "two_way"), ("two_way", "three_way")):
        assert report[more]["parameters"] - report[less]["parameters"] == matrix
        # What is not in the file of a tied model is one matrix in float32; the headers differ by some hundred bytes.
        assert abs(report[more]["checkpoint_bytes"] - report[less]["checkpoint_bytes"] - 4 * matrix) < 1000
        # Two moments in float32 for each parameter, and a step count for each tensor.
        assert abs(report[more]["optimizer_bytes"] - report[less]["optimizer_bytes"] - 8 * matrix) < 100
    for name in NAMES:
        assert report[name]["checkpoint_bytes"] == (folder / name / "model.safetensors").stat().st_size
        assert report[name]["tokens_per_second"] > 0 and 0 <= report[name]["exact_match"] <= 1
        assert report[name]["signatures"]["bleu"].startswith("nrefs:1")
    assert report["tokens"] > 32 * STEPS and report["seed"] == 3 and report["complete"]
    roles = {key.rpartition("/")[2] for log in report["history"]["three_way"] for key in log if "grad_share" in key}
    assert roles == {"source", "target", "output"}


@pytest.mark.slow
def test_the_output_is_a_table_samples_and_a_way_to_go_on(finished):
    _, _, printed = finished
    for expected in ("exact match", "BLEU", "three_way / untied", " > ", "holds  ", "--target_lang"):
        assert expected in printed, expected


@pytest.mark.slow
def test_the_saved_models_load_and_translate_and_the_picture_is_one(finished):
    _, folder, _ = finished
    models = {name: AutoModelForSeq2SeqLM.from_pretrained(folder / name) for name in NAMES}
    tokenizer = AutoTokenizer.from_pretrained(folder / "three_way")
    for model in models.values():
        assert_tied(model)
        assert len(tokenizer) == model.config.vocab_size
        assert model.generation_config.max_length == 64
        assert model.generate(**tokenizer("w1 w2", return_tensors="pt")).shape[1] > 1
    matrices = {
        name: len(
            {id(m.model.encoder.embed_tokens.weight), id(m.model.decoder.embed_tokens.weight), id(m.lm_head.weight)}
        )
        for name, m in models.items()
    }
    assert matrices == {"untied": 3, "two_way": 2, "three_way": 1}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_another_process_finds_otherwise_fails(finished, monkeypatch):
    _, folder, _ = finished
    folders = {name: folder / name for name in NAMES}
    expected = {
        name: {"logits": torch.ones(2, 3), "beams": torch.tensor([[1, 2]]), "parameters": torch.tensor(9)}
        for name in NAMES
    }
    question = {"input_ids": torch.ones(2, 3)}

    def checked(**changes):
        found = {f"{name}/{key}": value for name, answer in expected.items() for key, value in answer.items()}
        monkeypatch.setattr(proof, "in_fresh_process", lambda *asked: (found | changes, ""))
        return [check.holds for check in reload_checks(folders, expected, question)]

    assert checked() == [True, True]
    assert checked(**{"two_way/logits": torch.ones(2, 3) + 1e-3}) == [False, False]
    assert checked(**{"three_way/beams": torch.tensor([[1, 3]])}) == [False, False]
    assert checked(**{"three_way/parameters": torch.tensor(10)}) == [True, False]
    monkeypatch.setattr(proof, "in_fresh_process", lambda *asked: (None, "the process ended with 1: no such file"))
    checks = reload_checks(folders, expected, question)
    assert [check.holds for check in checks] == [False, False] and "ended with 1" in checks[0].evidence


@pytest.mark.parametrize("model_type", ["marian", "bart", "t5", "m2m_100", "prophetnet", "fsmt", "mt5", "pegasus"])
def test_the_three_models_differ_in_the_tied_matrices_alone(model_type):
    tokenizer = joint_tokenizer(["a b c"], 300, ("xx", "yy"))
    models = build_models(small_config(model_type, tokenizer, 32), 32, seed=1)
    untied, two_way, three_way = models.values()
    assert tuple(models) == NAMES and start_check(models).holds
    matrix = len(tokenizer) * 128
    assert untied.num_parameters() - two_way.num_parameters() == matrix
    assert two_way.num_parameters() - three_way.num_parameters() == matrix
    source, target, output = (find_parameter(untied, role.name) for role in roles(untied).values())
    assert not any(torch.equal(*two) for two in ((source, target), (target, output), (output, source)))
    embeddings = [find_parameter(model, roles(model)["target"].name) for model in models.values()]
    assert torch.equal(embeddings[0], embeddings[1]) and torch.equal(embeddings[0], embeddings[2])
    assert 0.9 < embeddings[0].norm(dim=1)[5:].mean() < 1.1


def test_models_that_start_apart_are_found():
    tokenizer = joint_tokenizer(["a b c"], 300, ("xx", "yy"))
    models = build_models(small_config("marian", tokenizer, 32), 32, seed=1)
    with torch.no_grad():
        models["three_way"].model.encoder.layers[1].fc1.weight[0, 0] += 1
    assert differing_at_the_start(models["untied"], models["three_way"]) == ["model.encoder.layers.1.fc1.weight"]
    assert not start_check(models).holds


def run(**changes) -> TranslationRun:
    values = dict(
        model=None, tokens=8, tokens_per_second=1.0, optimizer_bytes=1, data="d", history=[], translations=[]
    )
    return TranslationRun(**values | dict(exact_match=0.9, bleu={"score": 90.0}, chrf={"score": 90.0}) | changes)


def test_a_score_is_claimed_only_of_the_text_that_the_settings_were_chosen_for(tmp_path):
    settings = functools.partial(TranslationSettings, output_dir=tmp_path)
    assert settings().is_default_pair
    assert not settings(source_language="fr", target_language="pl").is_default_pair
    assert not settings(train_file=(tmp_path / "a.json",)).is_default_pair


def test_each_claim_about_the_outcome_can_fail():
    good = {
        name: {"parameters": n, "checkpoint_bytes": n, "bleu": 90.0} for name, n in zip(NAMES, (9, 6, 3), strict=True)
    }
    runs = {name: run() for name in NAMES}

    def holds(results, runs=runs, saved_once=frozenset(NAMES[1:])):
        return [check.holds for check in outcome_checks(runs, results, set(saved_once))]

    assert holds(good) == [True] * 3
    assert holds(good, runs | {"two_way": run(data="e")}) == [False, True, True]
    assert holds(good, runs | {"three_way": run(tokens=9)}) == [False, True, True]
    bad = good | {"three_way": {"parameters": 6, "checkpoint_bytes": 6, "bleu": 88.9}}
    assert holds(bad) == [True, False, False]
    # A file in which every name is written is not claimed to be smaller.
    assert holds(bad, saved_once=()) == [True, False]
    assert bleu_check(good).holds and not bleu_check(bad).holds
    assert success_check(run(exact_match=0.5)).holds and not success_check(run(exact_match=0.49)).holds


def test_other_batches_or_another_order_are_found_and_padding_is_no_token(monkeypatch):
    monkeypatch.setattr(Seq2SeqTrainer, "training_step", lambda *arguments: torch.zeros(()))

    def batch(*ids):
        labels = torch.tensor([[ids[0], -100]])
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)), "labels": labels}

    def fed(*batches):
        trainer = _RecordingTrainer.__new__(_RecordingTrainer)
        trainer.digest, trainer.tokens = hashlib.sha256(), []
        for inputs in batches:
            trainer.training_step(None, inputs)
        return trainer

    one, two = batch(1, 2, 3), batch(4, 5)
    assert fed(one, two).digest.hexdigest() == fed(one, two).digest.hexdigest()
    others = (fed(two, one), fed(one), fed(one, two | {"labels": two["labels"] + 1}), fed(one, two))
    assert len({trainer.digest.hexdigest() for trainer in others}) == 4
    assert fed(one, two).tokens == [4, 3]


def test_training_takes_every_pair_once_in_a_pass_in_batches_of_like_length(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = [[0] * int(n) for n in torch.randint(2, 30, (1000,), generator=generator)]
    corpora = SimpleNamespace(train_ids={"input_ids": rows, "labels": rows})

    def order(seed):
        return training_order(corpora, TranslationSettings(output_dir=tmp_path, seed=seed, steps=60, batch_size=32))

    assert order(0) == order(0) != order(1) and len(order(0)) == 60 * 32
    first, second = order(0)[:992], order(0)[992:1984]
    assert len(set(first)) == 992 and len(set(second)) == len(second)
    batches = [[len(rows[i]) for i in first[start : start + 32]] for start in range(0, 992, 32)]
    assert sum(max(batch) * 32 for batch in batches) < 1.1 * sum(map(sum, batches))
    middles = [batch[16] for batch in batches]
    rises = sum(a < b for a, b in zip(middles, middles[1:], strict=False))
    assert 8 < rises < 22, "batches come in the order of their lengths"


def test_translations_come_in_the_order_of_the_sentences():
    class Echo:
        device = "cpu"

        def generate(self, input_ids, attention_mask, max_length, num_beams, do_sample):
            assert (num_beams, do_sample) == (1, False)
            return torch.cat([torch.zeros_like(input_ids[:, :1]), input_ids], dim=1)[:, :max_length]

    tokenizer = joint_tokenizer(["a b c"], 300, ("xx", "yy"))
    sentences = ["a b c a b c", "b", "c a", "a", "b c a b"]
    assert translated(Echo(), tokenizer, sentences, max_length=20, batch_size=2) == sentences


@pytest.mark.slow
def test_the_pairs_of_cldr_are_the_default_and_must_be_learnt(monkeypatch, tmp_path, capsys):
    def few(source_language, target_language, fraction, seed):
        sides = [[f"{word} {i}" for i in range(n)] for word, n in (("in", 64), ("out", 8))]
        return tuple(ParallelCorpus(side, side[::-1], source_language, target_language) for side in sides)

    monkeypatch.setattr(corpus_module, "cldr_corpus", few)
    for name in ("reload_checks", "plot_curves"):
        monkeypatch.setattr(job, name, lambda *arguments: [])
    flags = ["--source_lang", "fr", "--target_lang", "pl", "--max_steps", 1, "--vocab_size", 300]
    assert demo(*flags, "--output_dir", tmp_path / "out") == 1
    printed = capsys.readouterr().out
    assert re.search(r"CLDR, written by Babel [\d.]+, fr to pl: 64 to train on, 8 held out", printed)
    assert "FAILS  three_way writes at least 50% of the held-out lines" in printed
    report = json.loads((tmp_path / "out/report.json").read_text())
    failed = [check["claim"] for check in report["checks"] if not check["holds"]]
    assert "three_way writes at least 50% of the held-out lines letter for letter" in failed


def test_over_long_lines_are_cut_with_one_warning_that_counts_them(tmp_path, told):
    lines = [{"translation": {"xx": f"{i} " * (100 if i < 3 else 1), "yy": f"{i}"}} for i in range(60)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, lines)))
    languages = {"source_language": "xx", "target_language": "yy"}
    settings = TranslationSettings((tmp_path / "long.jsonl",), output_dir=tmp_path / "x", vocab_size=262, **languages)
    prepared_corpora(settings)
    warnings = [message for message in told if "cut" in message]
    assert len(warnings) == 1 and "3 source sentences to 64 tokens" in warnings[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--source_lang", "jp"],
            "Unknown language 'jp': expected the code of a locale in CLDR, such as 'en' or 'pt-BR'; the nearest are",
        ),
        (["--target_lang", "en"], "are the same language"),
        (["--target_lang", "vo"], "CLDR has too few names in 'vo'"),
        (["--train_file", "{tmp}/missing.jsonl"], "There is no file"),
        (["--train_file", "{pairs}"], "has no 'en'"),
        ([*OWN, "--target_lang", "xx"], "are both 'xx'"),
        (["--train_file", "{tmp}/few.jsonl"], "2 pairs are too few"),
        (["--train_file", "{tmp}/blank.jsonl"], "is only spaces"),
        ([*OWN, "--model_type", "llama"], "is no translation model"),
        ([*OWN, "--model_type", "marain"], "has no model type 'marain'"),
        (["--scheme", "two_way"], "--scheme two_way does not go with this task"),
        ([*OWN, "--vocab_size", "12"], "at least 261"),
        (["--max_steps", "0"], "steps is 0"),
        (["--task", "language_model", "--source_lang", "en"], "--source_lang en does not go with this task"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_bad_input_is_a_message_and_nothing_is_written(flags, message, pairs, tmp_path, capsys):
    pair = {"translation": {"en": "one", "de": "eins"}}
    (tmp_path / "few.jsonl").write_text("\n".join([json.dumps(pair)] * 2))
    (tmp_path / "blank.jsonl").write_text(json.dumps({"translation": {"en": "one", "de": " "}}))
    before = sorted(tmp_path.iterdir())
    flags = [flag.format(tmp=tmp_path, pairs=pairs) for flag in flags]
    usage = "does not go with this task" in message
    assert demo(*flags, "--output_dir", tmp_path / "out") == (2 if usage else 3)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert sorted(tmp_path.iterdir()) == before


def test_an_unknown_task_is_a_usage_error(capsys):
    assert demo("--task", "translate") == 2
    assert "translate" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["matplotlib", "sacrebleu"])
def test_a_missing_package_is_named_before_anything_is_done(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(job, "prepared_corpora", lambda settings: pytest.fail("the pairs were made"))
    with pytest.raises(TyingError, match=rf"{package}, which is missing: pip install 'hf-tying\[demo\]'"):
        job.run_translation_demo(TranslationSettings(output_dir=tmp_path / "out"))
