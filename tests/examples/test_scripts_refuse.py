"""What a training script refuses: in one line, before any work, and with the way out."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from hf_tying import TyingError

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = (
    "hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=2,"
    "max_position_embeddings=64"
)
CLM = ("--model_type", "llama", "--config_overrides", SMALL, "--vocab_size", "300", "--block_size", "32", "--use_cpu")


@pytest.fixture(scope="module")
def mains():
    return {name: runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"] for name in ("run_clm", "run_translation")}


@pytest.fixture
def refused(mains, tmp_path, monkeypatch):
    """Runs a script's `main` and gives the one line that it refuses with; nothing is written."""

    def run(script: str, *arguments) -> str:
        out = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments), "--output_dir", str(out)])
        with pytest.raises(TyingError) as error:
            mains[script]()
        assert "\n" not in str(error.value) and not out.exists()
        return str(error.value)

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} and {i + 1} make a line.\n" for i in range(200)))
    return path


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.jsonl",
            b'{"content": "x", "id": 1}\n',
            "no column 'text'; it has 'content', 'id'. Name one",
        ),
        ("a.json", b'{"content": "x", "id": 1}\n', "no column 'text'; it has 'content', 'id'"),
        ("a.csv", b"content,id\nx,1\n", "no column 'text'; it has 'content', 'id'"),
        ("a.jsonl", b'{"text": 3}\n{"text": 4}\n', "holds int64: expected text"),
        ("a.jsonl", b"text\n", "first line of .* is not JSON"),
        ("a.jsonl", b'["text"]\n', "is list: expected an object on each line"),
        ("a.txt", "café\n".encode("latin-1"), "is not UTF-8: byte 3 is 0xe9.*iconv"),
        ("a.csv", "text\ncafé\n".encode("latin-1"), "is not UTF-8: byte 8 is 0xe9"),
        ("a.txt", b"caf\xc3", "is not UTF-8: byte 3 is 0xc3"),
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b" \n\n", "is empty"),
        ("a.csv", b"text\n", "cannot be read as csv|has no rows"),
        ("a.md", b"words", "ends in '.md': expected .txt, .json, .jsonl or .csv"),
        ("a", b"words", "ends in 'no suffix'"),
    ],
)
@pytest.mark.parametrize("flag", ["--train_file", "--validation_file"])
def test_bad_text_is_named(flag, name, content, message, text, tmp_path, refused):
    (tmp_path / name).write_bytes(content)
    files = ["--train_file", text] if flag != "--train_file" else []
    found = refused("run_clm", *CLM, "--do_train", "--do_eval", *files, flag, tmp_path / name)
    assert re.search(message, found), found


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "Nothing to do"),
        (["--do_eval", "--do_predict"], "--do_predict: this script measures perplexity by --do_eval"),
        (
            ["--do_train", "--learning_rte", "1"],
            "Unknown flag --learning_rte; .* '--learning_rate'",
        ),
        (["--do_train", "--learning_rate", "fast"], "--learning_rate.*: invalid float value: 'fast'"),
        (["oops", "--do_train"], "'oops' belongs to no flag"),
        (["--do_train", "--tying-scheme", "two-way"], "invalid choice: 'two-way'"),
        (["--do_train", "--block_size", "65"], "--block_size 65 is more than the 64 positions"),
        (["--do_train", "--al_alpha", "1"], "--al_alpha is an option of --objective al"),
        (["--do_train", "--objective", "al", "--cwt_gather"], "--cwt_gather is an option of --objective cwt"),
        (["--do_train", "--streaming"], "give --max_steps"),
        (["--do_train", "--do_eval", "--streaming", "--max_steps", "2"], "no known end to hold out"),
        (["--do_train", "--resume_from_checkpoint", "last"], "has no complete checkpoint"),
        (["--do_train", "--resume_from_checkpoint", "nowhere"], "not a checkpoint, no trainer_state.json"),
        (["--do_train", "--untie_at", "-1"], "untie_at"),
        (["--do_train", "--config_name", "nowhere"], "Expected one of --model_name_or_path"),
        (
            ["--do_train", "--config_overrides", "hidden_sze=3"],
            "'hidden_sze' is not in .* 'hidden_size'",
        ),
        (["--do_train", "--config_overrides", "hidden_size=big"], "expected int"),
        (["--do_train", "--config_overrides", ""], "its weights alone are .* GB"),
    ],
)
def test_wrong_flags_are_named(flags, message, text, refused, monkeypatch):
    from types import SimpleNamespace

    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))  # llama's default has 7B
    found = refused("run_clm", *CLM, "--train_file", text, *flags)
    assert re.search(message, found), found


@pytest.mark.parametrize(
    "model_type, message",
    [
        ("lama", "nearest names are 'llama'"),
        ("bart_", "'bart'"),
        ("gemma3", "of text alone, such as gemma3_text"),
    ],
)
def test_an_unfit_type_is_refused_with_the_nearest(model_type, message, text, refused):
    assert message in refused("run_clm", "--model_type", model_type, "--do_train", "--train_file", text, "--use_cpu")


@pytest.mark.parametrize("script", ["run_clm", "run_translation"])
def test_without_a_training_there_is_none_to_go_on_with(script, text, refused):
    flags = ("--model_name_or_path", "x", "--validation_file", text, "--do_eval", "--resume_from_checkpoint", "last")
    assert "goes on with a training: add --do_train, or --model_name_or_path CHECKPOINT" in refused(script, *flags)


def test_translation_refuses_likewise(text, refused):
    files = ("--train_source_file", text, "--train_target_file", text, "--source_lang", "en", "--target_lang", "de")
    assert "Nothing to do" in refused("run_translation", "--model_type", "marian", *files)
    assert "'marian'" in refused("run_translation", "--model_type", "marain", "--do_train", *files)
    assert "'--num_beams'" in refused("run_translation", "--model_type", "marian", "--num_beems", "2", *files)


def test_a_file_of_flags_is_typed_as_the_command_line_is(text, tmp_path, refused):
    for content, message in [
        ({"lerning_rate": "1e-3"}, "Unknown flag --lerning_rate in .*'--learning_rate'"),
        ({"learning_rate": "fast"}, "--learning_rate 'fast' in .* expected float"),
        ({"use_cpu": "maybe"}, "--use_cpu 'maybe' in .* expected true or false"),
        ([1], "does not hold a mapping. Expected flags"),
    ]:
        (tmp_path / "flags.yaml").write_text(yaml.safe_dump(content))
        assert re.search(message, refused("run_clm", tmp_path / "flags.yaml", "--train_file", text))
    (tmp_path / "flags.json").write_text(json.dumps({"do_train": True})[:-1])
    assert "cannot be read" in refused("run_clm", tmp_path / "flags.json")
