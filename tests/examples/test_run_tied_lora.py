"""`examples/run_tied_lora.py`: each task with tiny models, finished and stopped runs, and what it reports."""

import json
import random
import runpy
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MarianMTModel,
    set_seed,
)

from hf_tying import TyingError
from hf_tying.data import train_byte_level_bpe, train_joint_tokenizer
from hf_tying.peft.matrices import TiedMatrices
from hf_tying.training.memory import saved_activations
from hf_tying.training.translation import translation_config

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = {"a": "ein", "red": "roter", "dog": "hund", "car": "wagen", "runs": "rennt", "sleeps": "schläft"}
WIDTH, LAYERS, R = 16, 2, 4
LORA = LAYERS * 3 * R * 2 * WIDTH
TL5 = 4 * WIDTH * R
TL6 = TL5 + LAYERS * (R + 3 * WIDTH)


@pytest.fixture(scope="module")
def main():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield runpy.run_path(str(EXAMPLES / "run_tied_lora.py"))["main"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text for the tasks, and a tiny Llama and a tiny Marian."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    for split, number in (("train", 20), ("test", 7)):
        sentences = [draw.choices(list(WORDS), k=draw.randint(2, 9)) for _ in range(number)]
        english = [" ".join(words) for words in sentences]
        german = [" ".join(WORDS[word] for word in words) for words in sentences]
        for suffix, lines in (("en", english), ("de", german), ("txt", english * 4)):
            (folder / f"{split}.{suffix}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        rows = [(line, "even" if len(line) % 2 == 0 else 'an "odd') for line in english]
        table = "sentence\tlabel\n" + "".join(f"{line}\t{label}\n" for line, label in rows)
        (folder / f"{split}.tsv").write_text(table)
        (folder / f"{split}.json").write_text(
            "".join(json.dumps({"sentence": line, "label": label}) + "\n" for line, label in rows)
        )
    tokenizer = train_byte_level_bpe(list(WORDS), 280)
    tokenizer.save_pretrained(folder / "llama")
    sizes = dict(hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, head_dim=8)
    ids = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
    set_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **ids)).save_pretrained(folder / "llama")
    tokenizer = train_joint_tokenizer([folder / "train.en", folder / "train.de"], 290, ["en", "de"])
    tokenizer.save_pretrained(folder / "marian")
    config = translation_config("marian", tokenizer)
    sides = {"layers": LAYERS, "attention_heads": 2, "ffn_dim": 16}
    config.update({f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()})
    config.update({"d_model": WIDTH, "max_position_embeddings": 32, "init_std": 0.2})
    MarianMTModel(config).save_pretrained(folder / "marian")
    return folder


def start(main, folder, out, *flags, task="classification", form="tsv") -> str:
    """What the script prints, run in this process."""
    pairs = [f"--{split}_{side}_file" for split in ("train", "test") for side in ("source", "target")]
    names = ["train.en", "train.de", "test.en", "test.de"]
    files = {"--train_file": f"train.{form}", "--test_file": f"test.{form}"}
    files = dict(zip(pairs, names, strict=True)) if task == "translation" else files
    model = "marian" if task == "translation" else "llama"
    values = {"--task": task, "--model_name_or_path": folder / model, "--output_dir": out, "--r": R}
    values |= {name: folder / file for name, file in files.items()}
    values |= {"--max_length": 16, "--max_steps": 6, "--per_device_train_batch_size": 7, "--logging_steps": 3}
    argv = [part for pair in values.items() for part in pair]
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run_tied_lora.py", *map(str, argv), "--use_cpu", "--disable_tqdm", "true"])
        sys.argv += map(str, flags)
        patch.setattr(sys, "stdout", printed)
        main()
    return printed.getvalue()


def test_the_trainer_is_told_that_the_model_takes_the_mean_itself(main, folder, tmp_path, given_to_trainer):
    model = given_to_trainer(start, main, folder, tmp_path / "out", task="translation")
    assert model.get_base_model().accepts_loss_kwargs is False


@pytest.fixture(scope="module")
def classified(main, folder, tmp_path_factory):
    """All methods, in more than one epoch, with a dropout that draws another number of times in each of them.

    The folder, the flags, what was printed, and the report: some tests let the script write another one there.
    """
    out = tmp_path_factory.mktemp("runs") / "out"
    saving = ("--save_steps", 4, "--save_total_limit", 3)
    rates = ("--learning_rates", "lora=1e-2,tied=2e-2", "TL5=3e-2")
    flags = ("--compare", "lora,vera,TL5", "--dropout", 0.2, *saving, *rates)
    printed = start(main, folder, out, *flags)
    return out, flags, printed, report(out)


def report(out) -> dict[str, dict]:
    return {row["method"]: row for row in json.loads((out / "report.json").read_text())["methods"]}


def tied_is_shared(model) -> None:
    (matrices,) = (module for module in model.modules() if isinstance(module, TiedMatrices))
    assert len(matrices.tied_lora_A["default"]) == 1


def test_the_table_has_a_row_for_each_method_with_its_sizes_and_rate(classified):
    out, _, printed, rows = classified
    assert list(rows) == ["TL6", "lora", "vera", "TL5"]
    assert [rows[name]["parameters"] for name in ("TL6", "lora", "TL5")] == [TL6, LORA, TL5]
    assert rows["TL6"]["of_lora"] == TL6 / LORA
    assert [row["learning_rate"] for row in rows.values()] == [2e-2, 1e-2, 2e-3, 3e-2]
    for name, row in rows.items():
        assert row["head_parameters"] == 2 * WIDTH  # no part of the adapter
        file = out / f"{name}-seed0" / "adapter_model.safetensors"
        assert row["adapter_bytes"] == file.stat().st_size - 4 * 2 * WIDTH
        line = next(line for line in printed.splitlines() if line.startswith(f"│ {name} "))
        for cell in (f"{row['parameters']:,}", f"{row['of_lora']:.2%}", f"{row['adapter_bytes']:,} B"):
            assert cell in line
    assert 4 * TL6 <= rows["TL6"]["adapter_bytes"] <= 4 * TL6 + 8192
    assert rows["lora"]["step_of_lora"] == 1 and rows["TL6"]["step_of_lora"] > 0


def test_its_accuracy_is_that_of_the_saved_adapter(classified, folder):
    out, _, _, rows = classified
    for name, row in rows.items():
        ids = {'an "odd': 0, "even": 1}
        base = AutoModelForSequenceClassification.from_pretrained(folder / "llama", num_labels=2)
        base.config.pad_token_id = 0
        model = PeftModel.from_pretrained(base, out / f"{name}-seed0").eval()
        tokenizer = AutoTokenizer.from_pretrained(out / f"{name}-seed0")
        sentences = [line.split("\t") for line in (folder / "test.tsv").read_text().splitlines()[1:]]
        hits = []
        for sentence, label in sentences:
            with torch.no_grad():
                logits = model(**tokenizer(sentence, return_tensors="pt", truncation=True, max_length=16)).logits
            hits.append(int(logits.argmax()) == ids[label])
        found = row["metrics"]["accuracy"]
        assert found["mean"] == pytest.approx(100 * sum(hits) / len(hits)) and found["deviation"] is None


def test_a_finished_run_is_kept_and_a_seed_added(main, classified, folder):
    out, flags, *_ = classified
    files = [file for file in out.glob("*-seed0/*") if file.is_file()]
    written = {file: file.stat().st_mtime_ns for file in files}
    printed = start(main, folder, out, *flags, "--compare", "lora", "--seeds", 0, 1)
    assert {file: file.stat().st_mtime_ns for file in files} == written
    assert printed.count("Kept ") == printed.count("Train ") == 2
    values = report(out)["TL6"]["metrics"]["accuracy"]
    assert values["mean"] == pytest.approx(sum(values["values"]) / 2) and values["deviation"] >= 0
    batches = {(run["method"], run["seed"]): run["last_batch"] for run in json_runs(out)}
    assert batches["TL6", 0] == batches["lora", 0] != batches["TL6", 1] == batches["lora", 1]


def json_runs(out):
    return json.loads((out / "report.json").read_text())["results"]


def test_a_stopped_run_goes_on_to_the_same_end(main, classified, folder):
    out, flags, *_ = classified
    run = out / "TL6-seed0"
    before, result = load_file(run / "adapter_model.safetensors"), json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    for path in (run / "checkpoint-6").iterdir():
        path.unlink()
    (run / "checkpoint-6").rmdir()
    assert "Train " in start(main, folder, out, *flags, "--compare", "", "--resume_from_checkpoint", "last")
    after, again = load_file(run / "adapter_model.safetensors"), json.loads((run / "result.json").read_text())
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(again[key] == result[key] for key in ("updates", "last_batch", "scores", "saved_bytes"))
    first = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())
    assert [log["step"] for log in first["log_history"] if "loss" in log] == [3, 6]  # the first was not run again


def test_a_run_with_other_settings_is_not_taken_for_this_one(main, classified, folder):
    out, flags, *_ = classified
    with pytest.raises(TyingError, match=r"other settings \(learning_rate 0.02, now 0.5\): give another --output_dir"):
        start(main, folder, out, *flags, "--learning_rates", "lora=1e-2,TL6=0.5")


def test_the_same_rows_as_json_are_the_same_data(main, classified, folder):
    out, flags, *_ = classified
    assert "Kept " in start(main, folder, out, *flags, "--compare", "", form="json")


def test_a_language_model_is_tuned_by_switches(main, folder, tmp_path):
    switches = ("--train_u", "false", "--tie_qkv", "false", "--share_by", "shape", "--target_modules", "q_proj")
    printed = start(main, folder, tmp_path, *switches, "--compare", "lora", task="clm", form="txt")
    rows = report(tmp_path)
    assert list(rows) == ["tied", "lora"] and "perplexity" in printed
    assert rows["tied"]["parameters"] == 2 * WIDTH * R + LAYERS * WIDTH
    assert rows["tied"]["of_lora"] == (2 * WIDTH * R + LAYERS * WIDTH) / (LORA / 3)
    base = AutoModelForCausalLM.from_pretrained(folder / "llama")
    model = PeftModel.from_pretrained(base, tmp_path / "tied-seed0").eval()
    tied_is_shared(model)
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    ids = [*tokenizer((folder / "test.txt").read_text())["input_ids"], tokenizer.eos_token_id]
    blocks = torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss
    assert rows["tied"]["metrics"]["perplexity"]["mean"] == pytest.approx(loss.exp().item(), rel=1e-4)


def test_a_translation_model_is_tuned_and_its_translations_scored(main, folder, tmp_path):
    from sacrebleu import corpus_chrf

    flags = ("--variant", "TL5", "--compare", "lora,TL6", "--generation_num_beams", 2, "--learning_rate", 0.05)
    printed = start(main, folder, tmp_path, *flags, task="translation")
    rows = report(tmp_path)
    assert list(rows) == ["TL5", "lora", "TL6"] and "BLEU" in printed
    attentions = 3 * LAYERS  # A and B of self-attention, which encoder and decoder share, and of cross-attention
    assert rows["TL6"]["parameters"] - rows["TL5"]["parameters"] == attentions * (R + 3 * WIDTH)
    assert rows["TL5"]["parameters"] == 2 * TL5
    base = MarianMTModel.from_pretrained(folder / "marian")
    model = PeftModel.from_pretrained(base, tmp_path / "TL5-seed0").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "marian")
    inputs = tokenizer((folder / "test.en").read_text().splitlines(), return_tensors="pt", padding=True, max_length=16)
    ids = model.generate(**inputs, num_beams=2, max_length=16)
    lines = [" ".join(line.split()) for line in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert lines == (tmp_path / "TL5-seed0" / "translations.txt").read_text("utf-8").split("\n")[:-1]
    chrf = corpus_chrf(lines, [(folder / "test.de").read_text("utf-8").splitlines()]).score
    assert rows["TL5"]["metrics"]["chrf"]["mean"] == chrf


def test_the_table_shows_means_and_deviations_over_seeds(main):
    script = runpy.run_path(str(EXAMPLES / "tied_lora_report.py"))
    sizes = {"of_lora": 0.125, "head_parameters": 0, "adapter_bytes": 1234, "memory_kind": "saved"}
    results = [
        sizes
        | {"method": method, "seed": seed, "scores": {"bleu": bleu}, "step_seconds": seconds}
        | {"parameters": 100, "learning_rate": 1e-3, "memory_bytes": 2**20}
        for method, seed, bleu, seconds in (
            ("lora", 0, 30.0, 0.1),
            ("TL6", 0, 31.0, 0.11),
            ("lora", 1, 32.0, 0.2),
            ("TL6", 1, 34.0, 0.18),
        )
    ]
    console = Console(width=200, file=StringIO())
    console.print(script["results_table"](script["summary_of"](results, ("bleu",)), "title"))
    rows = [line.split("│")[1:-1] for line in console.file.getvalue().splitlines() if "│" in line]
    rows = [[cell.strip() for cell in row] for row in rows]
    assert [row[:3] for row in rows] == [["lora", "0.001", "31.00 ± 1.41"], ["TL6", "0.001", "32.50 ± 2.12"]]
    assert [row[7:] for row in rows] == [["1.000", "1.00 MiB"], ["1.000", "1.00 MiB"]]  # of 1.1 and 0.9 the mean


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--compare", "lora,dora"), "--compare has 'dora': expected some of lora, vera, TL5, TL6"),
        (("--compare", "lora,TL6"), "expected each method once, and TL6 runs anyway"),
        (("--seeds", "1", "1"), "--seeds is .* each once"),
        (("--learning_rates", "dora=1"), "--learning_rates has 'dora': expected some of lora, vera, TL5, TL6, tied"),
        (("--learning_rates", "tied=fast"), "--learning_rates has 'tied=fast': expected such as tied=1e-3"),
        (("--variant", "TL5", "--train_u", "true"), "Tied-LoRA: train_u=True contradicts variant='TL5'"),
        (("--variant", "TL7"), "variant='TL7': expected TL5 or TL6"),
        (("--r", "17"), "r=17 is more than any adapted module has"),
        (("--target_modules", "q_prj"), "on this model: .* nearest names in the model: .*q_proj"),
        (("--train_file", "missing.tsv"), "There is no file 'missing.tsv'"),
        (("--test_file", str(EXAMPLES / "run_clm.py")), "ends in '.py': expected a .csv, .tsv, .json"),
        (("--model_name_or_path", "missing"), "--model_name_or_path missing: "),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(main, folder, tmp_path, flags, message):
    with pytest.raises(TyingError, match=message) as error:
        start(main, folder, tmp_path / "out", *flags)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("text\tlabel\na\t1\n", "Row 1 of .* lacks sentence or label"),
        ("sentence\tlabel\na\t1\nb\t1\n", "has only the label '1'"),
        ("sentence\tlabel\n", "has no rows"),
    ],
)
def test_a_table_without_its_columns_or_labels_is_refused(main, folder, tmp_path, content, message):
    (tmp_path / "bad.tsv").write_text(content)
    with pytest.raises(TyingError, match=message):
        start(main, folder, tmp_path / "out", "--train_file", tmp_path / "bad.tsv")


def test_an_unseen_label_and_half_of_a_pair_are_refused(main, folder, tmp_path):
    (tmp_path / "test.tsv").write_text("sentence\tlabel\na dog\tgreen\n")
    with pytest.raises(TyingError, match="has the label 'green', which the training data has not"):
        start(main, folder, tmp_path / "out", "--test_file", tmp_path / "test.tsv")
    with pytest.raises(TyingError, match="Expected --validation_source_file and --validation_target_file for"):
        start(main, folder, tmp_path / "out", "--validation_source_file", "a.en", task="translation")


def test_each_epoch_has_its_order_whatever_was_drawn_before(main):
    order = sys.modules["tied_lora_training"].SeededOrder
    orders = []
    for epoch in (0, 0, 1):
        trainer = SimpleNamespace(args=SimpleNamespace(seed=3), state=SimpleNamespace(epoch=float(epoch)))
        torch.rand(1)
        orders.append(list(order(torch.utils.data.RandomSampler(range(50)), trainer)))
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == list(range(50))


def test_saved_activations_are_each_storage_once_and_no_parameters():
    layer = torch.nn.Linear(8, 4)
    x = torch.randn(3, 8)
    with saved_activations(layer) as saved:
        hidden = layer(x)  # keeps x, and the weight, which is not counted
        (hidden.sigmoid() * hidden.view(4, 3).t().sigmoid()[:3, :4]).sum()
    # x; the two sigmoids, each of which is kept by itself and as a factor
    assert saved.bytes == 4 * (3 * 8 + 2 * 3 * 4)
