"""What cannot be read, of every command: one sentence of ours, exit code 3, nothing written, with JSON and without."""

import json
import os
import shutil

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from hf_tying import TyingError
from hf_tying.cli.app import app
from hf_tying.report.hub_folder import _asked

from ..doctor import planted

#: Each command that reads a model, with its place.
COMMANDS = {
    "inspect": ["inspect", "SOURCE"],
    "doctor": ["doctor", "SOURCE", "--for", "all"],
    "diff": ["diff", "SOURCE", "model"],
    "diff, second": ["diff", "model", "SOURCE"],
    "tie": ["tie", "SOURCE", "two_way", "out"],
    "untie": ["untie", "SOURCE", "out"],
    "convert": ["convert", "SOURCE", "out", "--to", "portable"],
    "plan": ["plan", "SOURCE", "--mesh", "dp=2"],
    "export": ["export", "SOURCE", "out"],
    "export, unrolled": ["export", "SOURCE", "out", "--format", "unrolled"],
    "card": ["card", "SOURCE"],
    "publish": ["publish", "SOURCE", "me/x", "--dry-run", "--no-run"],
}


def without(name):
    return lambda folder: (folder / name).unlink()


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_json(folder):
    (folder / "config.json").write_text("{")


def no_text(folder):
    (folder / "config.json").write_bytes(b'{"a": "\xe9"}')


def a_pipe(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def a_circle_of_links(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "config.json")


def adapter_without_weights(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "TIED_LORA", "r": 2}')


#: How a folder is broken; and what is there in place of a folder.
BROKEN = {
    "no config": without("config.json"),
    "no weights": without("model.safetensors"),
    "truncated": truncated,
    "no JSON": no_json,
    "no text": no_text,
    "a pipe": a_pipe,
    "a circle of links": a_circle_of_links,
    "an adapter without weights": adapter_without_weights,
}
ELSEWHERE = ("away", "empty", "a file", "", "me/away", "me/x@v1", "me/x@bad revision", "me/x/sub", "hf://", "a\0b")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with `model`, broken copies of it, an empty folder and a file that is no model."""
    root = tmp_path_factory.mktemp("unreadable")
    planted.tied(root / "model")
    for name, spoil in BROKEN.items():
        shutil.copytree(root / "model", root / name)
        spoil(root / name)
    (root / "empty").mkdir()
    (root / "a file").write_text("hello")
    return root


#: `plan` reads the config alone.
CASES = [
    (command, source)
    for command in COMMANDS
    for source in (*BROKEN, *ELSEWHERE)
    if command != "plan" or source not in ("no weights", "truncated")
]


@pytest.mark.parametrize(("command", "source"), CASES)
def test_what_cannot_be_read_is_one_sentence_and_exit_code_3(hf_tying, here, monkeypatch, command, source):
    monkeypatch.chdir(here)
    before = sorted(here.iterdir())
    status, output, error = hf_tying(*[source if word == "SOURCE" else word for word in COMMANDS[command]], "--json")
    assert status == 3 and error.startswith("error ") and error.count("\n") == 1, error
    assert not [word for word in ("huggingface.co", "Traceback", "Errno", "/upload") if word in error], error
    told = json.loads(output)
    assert (told["schema"], told["command"]) == (1, command.partition(",")[0])
    message = told["findings"][0]["message"].replace("\0", "")  # a control character, which a terminal is not sent
    assert len(told["findings"]) == 1 and error == f"error {message}\n"
    assert sorted(here.iterdir()) == before


def test_every_command_is_among_them():
    known = {command.callback.__name__ for command in app.registered_commands}
    assert known == {words[0] for words in COMMANDS.values()} | {"demo"}  # tests/demo


@pytest.mark.parametrize("error, says", [
    (GatedRepoError, "it is gated"), (RepositoryNotFoundError, "none of that name"),
    (RevisionNotFoundError, "no branch"), (ValueError, "ValueError: a reason"),
])  # fmt: skip
def test_what_the_hub_answers_is_said_in_words_of_ours(error, says):
    def call():
        raise error.__new__(error, "a reason")  # which asks for the answer of a server

    with pytest.raises(TyingError, match=f"'me/x' is neither a folder nor a repository that can be read: .*{says}"):
        _asked("me/x", call)
