"""`examples/run_translation.py` as a user runs it: train, stop, resume, translate, load elsewhere."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainingArguments, Trainer

from hf_tying import TyingError, assert_tied
from hf_tying.data import train_byte_level_bpe, train_joint_tokenizer

from ..processes import run_python
from ..tiny_translation import COUNTS_BEAMS_BY_THE_SOURCE

SCRIPT = Path(__file__).parents[2] / "examples" / "run_translation.py"
STEPS = 80  # several times what it takes to learn ten sentences by heart from any start
WORDS = {
    "one": "ein",
    "two": "zwei",
    "red": "rote",
    "big": "große",
    "dogs": "Hunde",
    "cats": "Katzen",
    "run": "laufen",
}
BART = (
    "d_model=32,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,decoder_attention_heads=2,"
    "encoder_ffn_dim=32,decoder_ffn_dim=32,init_std=0.1,scale_embedding=true"
)
T5 = "d_model=16,num_layers=1,num_decoder_layers=1,num_heads=2,d_kv=8,d_ff=32"

# A process that never imports the package, whose `tying` entry transformers does not know.
ELSEWHERE = """
import sys
from pathlib import Path
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    beside = Path(folder, "decoder_tokenizer")
    target = AutoTokenizer.from_pretrained(beside) if beside.is_dir() else tokenizer
    batch = tokenizer(Path(sys.argv[1]).read_text().splitlines(), return_tensors="pt", padding=True)
    out = AutoModelForSeq2SeqLM.from_pretrained(folder).generate(**batch)
    assert "hf_tying" not in sys.modules
    for text in target.batch_decode(out, skip_special_tokens=True):
        print(" ".join(text.split()))
"""


def run(tmp_path, monkeypatch, flags: dict, suffix=".json"):
    """The script's `main` in this process, with its flags in a file."""
    dump = json.dumps if suffix == ".json" else yaml.safe_dump
    file = tmp_path / f"flags{suffix}"
    file.write_text(dump(flags))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(file)])
    runpy.run_path(str(SCRIPT))["main"]()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sentences that are translated word by word, as text and as JSON lines."""
    folder = tmp_path_factory.mktemp("text")
    number, colour, noun = ("one", "two"), ("red", "big"), ("dogs", "cats")
    sentences = [f"{a} {b} {c} run" for a in number for b in colour for c in noun] + [f"{c} run" for c in noun]
    for split, count in (("train", 10), ("validation", 4), ("test", 5)):
        pairs = [(english, " ".join(WORDS[word] for word in english.split())) for english in sentences[:count]]
        for language, side in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
            (folder / f"{split}.{language}").write_text("\n".join(side) + "\n", "utf-8")
        rows = [{"translation": {"en": english, "de": german}} for english, german in pairs]
        (folder / f"{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def text_flags(text, splits=("train", "validation", "test")):
    return {
        f"{split}_{side}_file": str(text / f"{split}.{language}")
        for split in splits
        for side, language in (("source", "en"), ("target", "de"))
    }


def json_flags(text, splits=("train", "validation", "test")):
    return {f"{split}_file": str(text / f"{split}.json") for split in splits} | {
        "source_lang": "en",
        "target_lang": "de",
    }


@pytest.fixture(scope="module")
def flags():
    return {
        "model_type": "marian",
        "config_overrides": BART,
        "vocab_size": 290,
        "do_train": True,
        "do_eval": True,
        "do_predict": True,
        "predict_with_generate": True,
        "num_beams": 2,
        "max_source_length": 24,
        "max_target_length": 24,
        "max_steps": 2,
        "per_device_train_batch_size": 5,
        "learning_rate": 0.01,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }


@pytest.fixture(scope="module")
def marian(flags, text, tmp_path_factory):
    """A three-way tied Marian that has learnt its ten sentences by heart."""
    folder = tmp_path_factory.mktemp("marian")
    more = {
        "scheme": "three_way",
        "label_smoothing_factor": 0.1,
        "max_steps": STEPS,
        "eval_strategy": "steps",
        "eval_steps": STEPS // 2,
        "save_strategy": "steps",
        "save_steps": STEPS // 2,
        "output_dir": str(folder / "out"),
    }
    more = flags | text_flags(text) | more
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(folder, monkeypatch, more, ".yaml")
    return folder / "out", more


@pytest.fixture(scope="module")
def separate(flags, text, tmp_path_factory):
    """A Marian with a vocabulary for each side."""
    folder = tmp_path_factory.mktemp("separate")
    train_joint_tokenizer([text / "train.en"], 280).save_pretrained(folder / "en")
    train_byte_level_bpe((text / "train.de").read_text("utf-8").splitlines(), 270).save_pretrained(folder / "de")
    names = {"tokenizer_name": str(folder / "en"), "target_tokenizer_name": str(folder / "de")}
    more = (
        flags | text_flags(text) | names | {"scheme": "two_way", "max_steps": STEPS, "output_dir": str(folder / "out")}
    )
    more |= {"num_beams": 1} if COUNTS_BEAMS_BY_THE_SOURCE else {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(folder, monkeypatch, more | {"save_strategy": "steps", "save_steps": STEPS // 2})
    return folder / "out", more


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def translations(folder):
    return (folder / "generated_predictions.txt").read_text("utf-8")


def test_it_learns_and_scores_with_a_signature_and_an_interval(marian):
    folder, _ = marian
    found = results(folder)
    assert found["eval_loss"] < 0.5 * math.log(290)
    assert found["predict_bleu"] > 50 and found["predict_chrf"] > 50
    assert 0 <= found["predict_bleu_confidence"] <= 100
    assert "bs:1000" in found["predict_bleu_signature"] and "nc:6" in found["predict_chrf_signature"]
    assert found["eval_bleu"] > 50 and found["eval_chrf"] > 50 and 5 < found["eval_gen_len"] < 24
    assert len(translations(folder).splitlines()) == 5
    logged = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in logged if "eval_bleu" in log] == [STEPS // 2, STEPS]


def test_the_model_is_tied_three_ways_and_knows_its_special_tokens(marian):
    folder, _ = marian
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert_tied(model)
    assert model.config.tying["scheme"] == "three_way"
    assert model.lm_head.weight is model.model.encoder.embed_tokens.weight is model.model.decoder.embed_tokens.weight
    assert len(tokenizer) == model.config.vocab_size == model.config.decoder_vocab_size
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<en>", "<de>"]) == [0, 2, 3, 4]
    for part in (model.config, model.generation_config):
        assert (part.pad_token_id, part.decoder_start_token_id) == (0, 0)
        assert part.eos_token_id in (2, [2])  # a list by training with transformers 5.17
    assert (model.generation_config.num_beams, model.generation_config.max_length) == (2, 24)


def test_resuming_ends_with_the_same_bits_as_the_uninterrupted_run(marian, tmp_path, monkeypatch):
    folder, more = marian
    resumed = {"output_dir": str(tmp_path / "out"), "resume_from_checkpoint": str(folder / f"checkpoint-{STEPS // 2}")}
    run(tmp_path, monkeypatch, more | resumed)
    # The first half is not trained again: it leaves no checkpoint here.
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    for name in ("model.safetensors", "generated_predictions.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_two_vocabularies_stay_two_and_both_tokenizers_are_kept(separate, text, tmp_path, monkeypatch):
    folder, more = separate
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert (model.config.vocab_size, model.config.decoder_vocab_size) == (280, 270)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    for checkpoint in (folder, folder / f"checkpoint-{STEPS // 2}"):
        assert len(AutoTokenizer.from_pretrained(checkpoint)) == 280
        assert len(AutoTokenizer.from_pretrained(checkpoint / "decoder_tokenizer")) == 270
    # The trainer is not given the source's special ids for the decoder: </s> is 2 there, and a letter here.
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 0
    assert "laufen" in translations(folder)

    again = {key: more[key] for key in more if key not in ("model_type", "config_overrides", "scheme", "do_train")}
    again = {key: value for key, value in again.items() if "tokenizer" not in key and "train_" not in key}
    again |= {"model_name_or_path": str(folder), "output_dir": str(tmp_path / "out"), "do_eval": False}
    run(tmp_path, monkeypatch, again)
    assert translations(tmp_path / "out") == translations(folder)


def test_another_process_without_the_package_translates_the_same(marian, separate, text):
    folders = [marian[0], separate[0]]
    printed = run_python("-c", ELSEWHERE, text / "test.en", *folders).stdout
    assert printed == "".join(map(translations, folders))


@pytest.mark.parametrize(
    "changes, start, names",
    [
        ({"model_type": "bart", "config_overrides": BART, "scheme": "source_target"}, 2, 3),
        ({"model_type": "t5", "config_overrides": T5, "scheme": "none", "source_prefix": "to German: "}, 0, 2),
        ({"model_type": "fsmt", "config_overrides": BART, "scheme": "three_way", "label_smoothing_factor": 0.1}, 2, 3),
    ],
    ids=["bart", "t5", "fsmt"],
)
def test_json_lines_train_other_types(flags, text, changes, start, names, tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, flags | json_flags(text) | changes | {"output_dir": str(tmp_path / "out")})
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert model.config.tying["scheme"] == changes["scheme"]
    assert [len(group.names) for group in model.tie_groups] == [names]
    assert model.config.decoder_start_token_id == model.generation_config.decoder_start_token_id == start
    assert results(tmp_path / "out")["eval_loss"] < 20
    words = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert ("ĠGerman" in words) == ("source_prefix" in changes)  # the prefix stands before each sentence


def test_a_saved_model_is_tied_another_way_and_the_samples_are_limited(marian, text, flags, tmp_path, monkeypatch):
    folder, _ = marian
    changes = {"scheme": "two_way", "init_from": "source", "max_eval_samples": 2, "max_predict_samples": 3}
    more = {key: flags[key] for key in flags if key not in ("model_type", "config_overrides")} | json_flags(text)
    run(
        tmp_path,
        monkeypatch,
        more | changes | {"model_name_or_path": str(folder), "output_dir": str(tmp_path / "out")},
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert model.lm_head.weight is not model.model.encoder.embed_tokens.weight
    assert len(translations(tmp_path / "out").splitlines()) == 3


def test_translations_stay_in_order_when_training_groups_by_length(marian, text, flags, tmp_path, monkeypatch):
    folder, _ = marian
    more = {key: flags[key] for key in flags if key not in ("model_type", "config_overrides")} | json_flags(text)
    changes = {"do_train": False, "do_eval": False, "train_sampling_strategy": "group_by_length"}
    out = tmp_path / "out"
    run(tmp_path, monkeypatch, more | changes | {"model_name_or_path": str(folder), "output_dir": str(out)})
    assert translations(out) == translations(folder)
    assert results(out)["predict_bleu"] == results(folder)["predict_bleu"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_source_file": "missing.en"}, r"no file 'missing.en'"),
        ({"train_target_file": None}, r"--train_file, or both --train_source_file and --train_target_file"),
        ({"train_file": "a.json"}, r"--train_file, or both"),
        ({"validation_source_file": None, "validation_target_file": None}, r"--validation_file, or both"),
        (
            {"train_source_file": None, "train_target_file": None, "train_file": "a.json"},
            r"say which with --source_lang",
        ),
        ({"predict_with_generate": False}, r"--do_predict .* needs --predict_with_generate"),
        ({"scheme": "three-way"}, r"--scheme 'three-way' in .* expected one of none, two_way"),
        ({"model_type": "gpt2"}, r"'gpt2' is no translation model"),
        ({"model_name_or_path": "x"}, r"one of --model_name_or_path"),
        (
            {"config_overrides": "d_model=16,layers=1"},
            r"key 'layers' is not in .*'encoder_layers'",
        ),
        ({"config_overrides": BART + ",max_position_embeddings=20"}, r"24 tokens and the model has 20 positions"),
        ({"vocab_size": 200}, r"vocabulary of 200 is too small"),
        ({"tokenizer_name": "nowhere/nothing"}, r"--tokenizer_name nowhere/nothing: "),
        (
            {"model_type": None, "config_overrides": None, "model_name_or_path": "nowhere/nothing"},
            r"--model_name_or_path nowhere/nothing: ",
        ),
        ({"model_type": None, "model_name_or_path": "x"}, r"--config_overrides is for a model from scratch"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(flags, text, changes, message, tmp_path, monkeypatch):
    changed = flags | text_flags(text) | changes | {"output_dir": str(tmp_path / "out")}
    with pytest.raises(TyingError, match=message) as error:
        run(tmp_path, monkeypatch, {key: value for key, value in changed.items() if value is not None})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_metric_that_cannot_be_computed_is_said_before_the_training(flags, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(TyingError, match=r"sacrebleu, which is missing: pip install 'hf-tying\[metrics\]'"):
        run(tmp_path, monkeypatch, flags | text_flags(text) | {"output_dir": str(tmp_path / "out")})
    assert not (tmp_path / "out").exists()


def test_two_vocabularies_of_equal_size_and_different_words_are_not_tied(separate, text, flags, tmp_path, monkeypatch):
    names = {}
    for key, language in (("tokenizer_name", "en"), ("target_tokenizer_name", "de")):
        names[key] = str(tmp_path / language)
        train_joint_tokenizer([text / f"train.{language}"], 270, languages=[]).save_pretrained(names[key])
    with pytest.raises(TyingError, match="vocabular"):
        run(
            *(tmp_path, monkeypatch),
            flags | text_flags(text) | names | {"scheme": "three_way", "output_dir": str(tmp_path / "out")},
        )
    assert not (tmp_path / "out").exists()


def test_an_error_ends_the_script_with_one_line(text, tmp_path, as_script):
    arguments = ["--model_type", "marian", "--do_train", "--train_source_file", text / "train.en"]
    arguments += ["--train_target_file", text / "test.de", "--output_dir", tmp_path / "out"]
    result = as_script(SCRIPT, *arguments)
    assert result.returncode == 1
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and "has 10 lines" in line and "has 5: expected as many" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["text", "json"])
def test_sentences_without_references_are_translated(form, marian, text, flags, tmp_path, monkeypatch):
    folder, _ = marian
    more = {key: flags[key] for key in flags if key not in ("model_type", "config_overrides")}
    more |= {"do_train": False, "do_eval": False, "source_lang": "en", "target_lang": "de"}
    if form == "text":
        more["test_source_file"] = str(text / "test.en")
    else:
        rows = [{"translation": {"en": line}} for line in (text / "test.en").read_text().splitlines()]
        (tmp_path / "test.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        more["test_file"] = str(tmp_path / "test.json")
    run(tmp_path, monkeypatch, more | {"model_name_or_path": str(folder), "output_dir": str(tmp_path / "out")})
    assert translations(tmp_path / "out") == translations(folder)
    assert "predict_bleu" not in results(tmp_path / "out")


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_eval_and_predict_score_the_same_lines_alike(strategy, marian, text, flags, tmp_path, monkeypatch):
    folder, _ = marian
    more = {key: flags[key] for key in flags if key not in ("model_type", "config_overrides")}
    more |= text_flags(text, ["test"]) | {"train_sampling_strategy": strategy, "do_train": False}
    more |= {f"validation_{side}_file": more[f"test_{side}_file"] for side in ("source", "target")}
    # Cut references are shorter than what is scored.
    more |= {"max_target_length": 6, "generation_max_length": 24, "model_name_or_path": str(folder)}
    gathered, loop = [], Trainer.evaluation_loop
    monkeypatch.setattr(
        Trainer, "evaluation_loop", lambda self, *a, **k: gathered.append(self.gather_function) or loop(self, *a, **k)
    )
    run(tmp_path, monkeypatch, more | {"output_dir": str(tmp_path / "out")})
    # Of several processes: without the rows that fill up their last batch, which would have no references.
    assert [gather.__name__ for gather in gathered] == ["gather_for_metrics"] * 2
    found = results(tmp_path / "out")
    assert found["eval_bleu"] == found["predict_bleu"] > 50 and found["eval_chrf"] == found["predict_chrf"]


@pytest.mark.parametrize(
    ("script", "name"), [(SCRIPT, "OrderedTrainer"), (SCRIPT.with_name("ulmfit_classifier.py"), "ClassifierTrainer")]
)
def test_an_epoch_by_length_has_one_order_also_after_a_stop(script, name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(script.parent))
    kind = runpy.run_path(str(script))[name]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), train_sampling_strategy="group_by_length", use_cpu=True, report_to="none"
    )
    rows = [{"input_ids": [3] * (1 + i % 7)} for i in range(40)]
    orders = []
    for drawn, epoch in ((1, 1.0), (2, 1.25), (3, 2.0)):  # at the beginning, resumed within it, and the next one
        torch.manual_seed(drawn)
        trainer = kind(model=torch.nn.Linear(1, 1), args=arguments, train_dataset=rows, data_collator=list)
        trainer.state.epoch = epoch
        orders.append(list(trainer._get_train_sampler()))
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == list(range(40))
