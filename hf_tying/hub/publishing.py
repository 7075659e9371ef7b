"""`publish`: a folder put on the Hub in one commit, after everything that could be wrong with it was looked at."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..config import TyingError
from ..report.dispatch import tying_report
from ..ties.headers import read_json
from .cards import CARD, make_card, refuse_strange
from .code_blocks import blocks_of, run_blocks
from .errors import MissingChoice, UnfitError
from .facts import FACTS, facts_of
from .folders import write_forms
from .loading import refuse_other_function
from .renewing import copy_published_card
from .repository_names import has_form_of_id, is_published

#: What a training leaves behind for itself. `training_args.bin` is a pickle that holds paths of this machine.
_LEFT_OUT = (
    "training_args.bin",
    "optimizer.*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "checkpoint-*",
    "runs",
    "logs",
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
_TEXT = (".md", ".json", ".py", ".txt", ".jinja", ".yaml", ".yml")


@dataclass(frozen=True)
class Published:
    """What `publish` did, or would do.

    Args:
        repo_id: repository.
        files: size in bytes of each uploaded file, by its path.
        left_out: files of the folder that were not uploaded.
        blocks: how many code blocks of the card ran.
        questions: facts that readers ask for, and nobody has told: `"license"`, ...
        url: page of the commit; `None` for a dry run.
        card: text of the card.
    """

    repo_id: str
    files: dict[str, int]
    left_out: list[str] = field(default_factory=list)
    blocks: int = 0
    questions: list[str] = field(default_factory=list)
    url: str | None = None
    card: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain types all through, ready for `json.dumps`."""
        return {
            "repo_id": self.repo_id,
            "files": self.files,
            "left_out": self.left_out,
            "blocks": self.blocks,
            "questions": self.questions,
            "url": self.url,
        }


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: bool | str | None = None,
    yes: bool = False,
    run: bool = True,
    dry_run: bool = False,
    **facts: Any,
) -> Published:
    """Publish a saved model or Tied-LoRA adapter in one commit, with a card, for people with and without this package.

    Before a repository is created: the ties of the folder are checked; a base model must be one that the Hub knows; an
    adapter gets both forms; the card is made and its metadata checked; each code block of the card runs in a fresh
    process; no text of the folder may hold a token or the path of the folder. The folder itself stays as it is, but
    for its card and `tying_card.json`. What a training keeps for itself (`optimizer.pt`, `training_args.bin`,
    `checkpoint-*`) is not uploaded. After the upload, the blocks run once more, on the repository.

    Args:
        folder: folder of a model or of a Tied-LoRA adapter.
        repo_id: repository, `"owner/name"`, or `"name"` for one of the user's own.
        private: whether a new repository is private. Default: the Hub's own default.
        revision: branch. Default: the main branch.
        create_pr: whether to open a pull request. Default `False`.
        commit_message: title of the commit.
        token: token of the Hub. Default: the saved one.
        yes: agree to publish a model that computes something else without this package (PR in a stock class).
        run: whether to run the code blocks. Default `True`. They load the model, and download the base of an adapter.
        dry_run: do all but the upload, and write nothing.
        **facts: what only a person can tell, as for `make_card`.

    Returns:
        What was uploaded, or would be.

    Raises:
        MissingChoice: a choice is missing. Nothing has been created.
        UnfitError: the folder or its card is not fit to be published. Nothing has been created, unless a block of the
            card fails on the repository alone.
        TyingError: the folder cannot be read.
    """
    folder = refuse_strange(folder)
    if not has_form_of_id(repo_id):
        raise TyingError(f"{repo_id!r} is no name of a repository: expected owner/name.")
    api = HfApi(token=token)
    if "/" not in repo_id and not dry_run:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    with tempfile.TemporaryDirectory(prefix="hf-tying-") as work, _named(Path(work) / "upload", folder):
        staged = Path(work) / "upload"
        left_out = _stage(folder, staged)
        _refuse_broken(folder, yes)
        _name_the_base(staged, facts.get("base_model"), token)
        write_forms(staged)
        if not (staged / CARD).is_file() and not dry_run:
            copy_published_card(staged, repo_id, revision, token)
        card = make_card(staged, repo_id=repo_id, **facts)
        _refuse_leaks(staged, folder)
        blocks = run_blocks(card.text, repo_id, staged) if run else 0
        files = {str(path.relative_to(staged)): path.stat().st_size for path in _files(staged)}
        told = facts_of(staged).missing
        questions = [name for name in told if not getattr(card.data, name, None)]
        result = Published(repo_id, files, left_out, blocks, questions, card=card.content)
        if dry_run:
            return result
        for name in (CARD, FACTS):
            if (staged / name).is_file():
                shutil.copyfile(staged / name, folder / name)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=staged,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Publish with hf-tying",
        )
        if run and blocks_of(card.text) and revision is None and not create_pr:
            run_blocks(card.text, repo_id, repo_id)
        return Published(
            repo_id, files, left_out, blocks, questions, str(getattr(commit, "pr_url", None) or commit), card.content
        )


@contextmanager
def _named(staged: Path, folder: Path) -> Iterator[None]:
    """Errors name the folder of the user, and not the one that is uploaded, which is gone then."""
    try:
        yield
    except ValueError as error:  # a TyingError is one, and so is what PEFT finds
        kind = type(error) if isinstance(error, TyingError) else TyingError
        raise kind(str(error).replace(str(staged), str(folder))) from error


def _stage(folder: Path, staged: Path) -> list[str]:
    """Put what is uploaded into a folder of its own, by hard links where possible. Returns what is left out."""
    left_out: list[str] = []

    def ignore(place: str, names: list[str]) -> set[str]:
        found = shutil.ignore_patterns(*_LEFT_OUT, ".*", "__pycache__")(place, names)
        left_out.extend(os.path.relpath(os.path.join(place, name), folder) for name in sorted(found))
        return found

    def place(source: str, target: str) -> str:
        if source.endswith((".safetensors", ".bin", ".pt", ".gguf")):
            try:
                os.link(source, target)
                return target
            except OSError:
                pass  # another file system
        return shutil.copy2(source, target)

    try:
        shutil.copytree(folder, staged, ignore=ignore, copy_function=place)
    except shutil.Error as error:
        path, _, reason = error.args[0][0]
        raise TyingError(f"{path} cannot be read: {reason}") from None
    return left_out


def _refuse_broken(folder: Path, yes: bool) -> None:
    """Refuse a folder whose ties are broken, or one that means something else to others, unless that was agreed to."""
    if not (folder / "config.json").is_file():
        return
    report = tying_report(folder)
    if not report.ok:
        found = "; ".join(
            f"{finding.code} {finding.message} {finding.mend or ''}".strip() for finding in report.findings
        )
        raise UnfitError(f"Nothing is uploaded: {found}")
    if not yes:
        refuse_other_function(folder, read_json(folder / "config.json"), report)


def _name_the_base(staged: Path, told: str | None, token: bool | str | None) -> None:
    """Write a base model that was told into the settings of adapters, and refuse one that others cannot find."""
    settings = {path: read_json(path) for path in staged.glob("**/adapter_config.json")}
    bases = [told] if told else [each.get("base_model_name_or_path") for each in settings.values()]
    for base in bases:
        if base and not is_published(base, token):
            raise MissingChoice(
                f"Nothing is uploaded: the base model is {str(base)!r}, a place on this machine that others cannot "
                "load. Publish it first, and name it by its id: base_model='owner/name' (--base-model owner/name)."
            )
    for path, each in settings.items():
        if told and each.get("base_model_name_or_path") != told:
            path.write_text(json.dumps(each | {"base_model_name_or_path": told}, indent=2, sort_keys=True) + "\n")


def _refuse_leaks(staged: Path, folder: Path) -> None:
    """Refuse text that holds a token, or the place of the folder on this machine."""
    # Whole paths: not the end of an address, nor the start of a longer name.
    places = [rf"{re.escape(str(place))}(?![\w-])" for place in (folder.resolve(), staged)]
    if (home := Path.home()) != Path(home.anchor):
        places.append(re.escape(str(home) + os.sep))
    local = re.compile(rf"(?:(?<![\w.:/-])|(?<=file://))(?:{'|'.join(places)})")
    for path in _files(staged):
        if path.suffix not in _TEXT or path.stat().st_size > 20 * 2**20:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        name = path.relative_to(staged)
        if _TOKEN.search(text):
            raise UnfitError(f"Nothing is uploaded: {name} holds a token of the Hub. Take it out, and revoke it.")
        if found := local.search(text):
            raise UnfitError(f"Nothing is uploaded: {name} names {found[0]!r}, a place on this machine. Take it out.")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
