"""What the card of a tied model says: all of it read from the files of its folder, and from what was told."""

from dataclasses import replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from ..config import TyingConfig
from ..report.checkpoint import read_checkpoint
from ..report.dispatch import tying_report
from ..report.dtypes import bytes_of
from ..report.opening import open_source
from ..report.records import GroupReport, TyingReport
from ..ties.headers import read_json
from .facts import Facts
from .loading import Loading, how_loaded
from .papers import papers_for
from .results import Results
from .tags import is_of_layers, scheme_of, tags_of
from .words import code, megabytes, plain

_MOST_GROUPS = 20
_MOST_NAMES = 8
_SHARED = {
    "two_way": "input embedding and softmax are **one matrix** (two-way weight tying)",
    "three_way": "source embedding, target embedding and softmax are **one matrix** (three-way weight tying)",
    "source_target": "source and target embedding are **one matrix**",
}
_OUTCOMES = {
    "same": "right values, tied by the class itself.",
    "apart": "right values, each name with a matrix of its own, and no tie.",
    "random": "**wrong values**: the file has each matrix of the ties once, and the others are filled with random "
    "numbers. This model needs `hf_tying`.",
    "wrong": "**wrong values**: the file has each matrix of the ties once, and the class takes other matrices for the "
    "rest. This model needs `hf_tying`.",
    "no file": "an error: the file has each shared layer once, under a name that transformers does not look for. This "
    "model needs `hf_tying`.",
    "code": "the model, tied, by the code in this repository.",
    "other": "**another function**: the projection before the softmax is left out. This model needs `hf_tying`.",
    "nothing": "an error, since transformers does not know this class. This model needs `hf_tying`.",
    "unknown": "what the library gives that has this class; transformers does not know it.",
}
#: What plain transformers loads with the right values, in as many matrices or in other numbers of them.
_RIGHT = ("same", "copies", "merged", "regrouped")
#: What is loaded right by this package alone.
_NEEDS_US = ("other", "random", "wrong", "no file", "nothing")


def model_context(folder: Path, repo_id: str, facts: Facts, results: Results) -> dict[str, Any]:
    """The values for the template of a tied model, and its metadata under `metadata`, `tags` and `task`.

    Args:
        folder: folder with `config.json` and safetensors files.
        repo_id: where the model is, or will be.
        facts: what was told.
        results: what the run has left.

    Raises:
        TyingError: the files cannot be read.
    """
    config = read_json(folder / "config.json")
    report = replace(tying_report(folder), source=repo_id)
    loading = how_loaded(folder, config, report)
    entry = TyingConfig.in_config(config)
    scheme = report.scheme or scheme_of(group.roles.values() for group in report.groups)
    projected = entry.projection is not None
    groups = report.groups[:_MOST_GROUPS]
    features = (scheme if scheme != "none" else None, "projection" if projected else None, *facts.features)
    return {
        "summary": _summary(report, scheme, facts, entry),
        "sizes": _sizes(folder, report),
        "groups": [_row(group) for group in groups],
        "more_groups": len(report.groups) - len(groups),
        "checked": _checked(report, config),
        "outcome": _outcome(loading, report),
        "plain_code": _plain_code(folder, repo_id, loading),
        "tied_code": _tied_code(repo_id, loading, bool(report.groups) or loading.outcome in _NEEDS_US),
        "code_files": _code_files(folder) if loading.outcome == "code" else "",
        "papers": papers_for(*features) if report.groups or facts.features else [],
        "tags": [*(tags_of(config) or (["weight-tying"] if report.groups else [])),
                 *(["custom_code"] if loading.outcome == "code" else [])],
        "task": loading.task,
        "library": "hf_tying" if loading.outcome in _NEEDS_US else "transformers",
        "base_model": facts.base_model,
        "relation": "finetune",
        "shares": results.shares,
    }  # fmt: skip


def _summary(report: TyingReport, scheme: str | None, facts: Facts, entry: TyingConfig) -> str:
    kind = code(report.architecture)
    article = "An" if report.architecture[:1] in "AEIOU" else "A"
    sentence = f"{article} {kind} of {report.parameters:,} parameters"
    layers = [group for group in report.groups if is_of_layers(group.name, group.names, group.roles)]
    relaxed = [group for group in report.groups if group.name in entry.relax]
    if any(group.roles for group in relaxed):
        scheme = None  # one matrix, and a difference
        sentence += " whose embeddings are **one matrix with differences** (a relaxed tie)"
    if scheme in _SHARED:
        sentence += f" whose {_SHARED[scheme]}"
    if layers:
        count = "a group of matrices is" if len(layers) == 1 else f"{len(layers)} groups of matrices are"
        differ = ", with differences" if any(group in layers for group in relaxed) or _relaxes_layers(entry) else ""
        sentence += f"{' ' if sentence.endswith('parameters') else ', and '}in whose layers {count} shared{differ}"
    elif sentence.endswith("parameters"):
        sentence += ", with shared parameters" if report.groups else ", in which nothing is tied"
    sentence += "."
    if entry.projection is not None:
        sentence += " A projection (PR) stands before the softmax."
    if facts.base_model:
        sentence += f" Trained from [{facts.base_model}](https://huggingface.co/{facts.base_model})."
    return f"{sentence} {facts.description}" if facts.description else sentence


def _relaxes_layers(entry: TyingConfig) -> bool:
    return any("relax" in stack for stack in entry.depth)


def _sizes(folder: Path, report: TyingReport) -> dict[str, int]:
    """Elements and bytes, as the model is and as it would be untied."""
    tensors = read_checkpoint(open_source(folder)).tensors.values()
    in_file = sum((folder / file).stat().st_size for file in {tensor.file for tensor in tensors})
    held = {tensor.dtype for tensor in tensors if prod(tensor.shape) > 0}
    element = bytes_of(held.pop()) if len(held) == 1 else 0
    saved = sum(group.parameters_saved for group in report.groups)
    return {
        "parameters": report.parameters,
        "untied_parameters": report.parameters + saved,
        "file": in_file,
        "untied_file": in_file + sum(group.file_bytes_saved or 0 for group in report.groups),
        "moments": 2 * element * report.parameters,
        "untied_moments": 2 * element * (report.parameters + saved),
    }


def _row(group: GroupReport) -> dict[str, str]:
    names = group.names[:_MOST_NAMES]
    more = [f"and {len(group.names) - len(names)} more"] if len(group.names) > len(names) else []
    held = len(group.in_file or [])
    return {
        "name": group.name,
        "names": " <br> ".join([*map(code, names), *more]),
        "roles": " <br> ".join(group.roles.get(name, "") for name in names) if group.roles else "",
        "shape": f"{' x '.join(f'{n:,}' for n in group.shape)} {group.dtype}",
        "in_file": f"{held} of {len(group.names)}",
    }


def _checked(report: TyingReport, config: dict[str, Any]) -> str:
    written = f", transformers {config['transformers_version']}" if config.get("transformers_version") else ""
    if report.ok:
        return f"Checked by hf_tying {version('hf-tying')}{written}: config and file agree."
    return "\n".join(f"- **{finding.code}** {plain(finding.message)}" for finding in report.findings)


def _outcome(loading: Loading, report: TyingReport) -> str:
    if loading.outcome == "same" and all(group.apart for group in report.groups):
        return "the same model."
    if loading.outcome not in _RIGHT[1:]:
        return _OUTCOMES[loading.outcome]
    copies = f"{loading.copies:,} parameters more, which are copies that further training lets drift apart"
    merged = (
        f"{loading.merged:,} parameters fewer, since the class ties matrices that are equal in this file and that "
        "`hf_tying` keeps apart"
    )
    said = [text for count, text in ((loading.copies, copies), (loading.merged, merged)) if count]
    return f"right values; {'; '.join(said)}."


def _plain_code(folder: Path, repo_id: str, loading: Loading) -> str:
    if loading.outcome not in (*_RIGHT, "apart", "code"):
        return ""
    trusted = ", trust_remote_code=True" if loading.outcome == "code" else ""
    load = f'model = {loading.auto_class}.from_pretrained("{repo_id}"{trusted})'
    if not (folder / "tokenizer_config.json").is_file() or loading.task != "text-generation":
        return f"from transformers import {loading.auto_class}\n\n{load}"
    return (
        f"from transformers import {loading.auto_class}, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n{load}\n'
        'inputs = tokenizer("The", return_tensors="pt", return_token_type_ids=False)\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=10)[0]))"
    )


def _tied_code(repo_id: str, loading: Loading, tied: bool) -> str:
    if loading.outcome in ("code", "unknown") or not tied:
        return ""
    return (
        f"import hf_tying\nfrom transformers import {loading.auto_class}\n\n"
        f'model = {loading.auto_class}.from_pretrained("{repo_id}")\nhf_tying.assert_tied(model)'
    )


def _code_files(folder: Path) -> str:
    own = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("hf_tying_")]
    carried = [path for path in folder.glob("hf_tying_*.py")]
    listed = [f"{code(path.name)} ({megabytes(path.stat().st_size)})" for path in own]
    if carried:
        listed.append(f"{len(carried)} files of hf_tying ({megabytes(sum(p.stat().st_size for p in carried))})")
    return ", ".join(listed)
