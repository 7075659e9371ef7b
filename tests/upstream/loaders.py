"""The forecast of `hf-tying doctor --for`, beside what loaders really do: `python -m tests.upstream.loaders`.

Each loader is installed by pip into a folder of its own under `.upstream/loaders`, once, and runs in a process without
this package. Where one cannot be installed, it is left out, and the reason is printed.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import hf_tying.doctor
from hf_tying import TyingConfig, share_layers, tie, use_projection
from hf_tying.doctor.facts import ModelFacts
from hf_tying.doctor.loaders import forecast
from hf_tying.report.checkpoint import read_checkpoint
from hf_tying.report.opening import open_source

from ..doctor.planted import edit, noise, rewrite, tensor
from ..tiny import SEQ2SEQ, tiny_config

CACHE = Path(__file__).parents[2] / ".upstream" / "loaders"
MLX = "mlx-lm-0.32.2"
#: By environment: the loader, and what pip installs; nothing for the installed transformers.
ENVIRONMENTS: dict[str, tuple[str, list[str]]] = {
    "transformers-5.17.0": ("transformers", ["transformers==5.17.0"]),
    "transformers-installed": ("transformers", []),
    "transformers-5.24.0": ("transformers", ["transformers==5.24.0"]),
    MLX: ("mlx", ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2"]),
}
ARCHITECTURES = ["llama", "qwen3", "qwen2", "gpt2", "gemma", "gemma3_text", "mistral", "mixtral", "gpt_neox", "phi",
                 "phi3", "mamba", "olmo2", "cohere", "starcoder2", "granite", "helium", "qwen3_moe", "falcon", "opt",
                 "bart", "t5"]  # fmt: skip
LORA = {"kind": "lora", "rank": 2}

console = Console()


class Names(NamedTuple):
    """The names of the embedding and of the softmax matrix, as a file has them."""

    embedding: str
    head: str


def model_of(architecture: str, tied: bool) -> PreTrainedModel:
    """A small random model of a stock class."""
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if architecture in SEQ2SEQ else AutoModelForCausalLM
    return auto.from_config(tiny_config(architecture, tie_word_embeddings=tied))


def _changed(tied: bool, change: Callable[[Path, Names], None] = lambda folder, names: None) -> Callable:
    """What plants a stock model and changes its files."""

    def plant(architecture: str, folder: Path) -> None:
        model_of(architecture, tied).save_pretrained(folder)
        change(folder, names_in(folder))

    return plant


def _held(make: Callable[[PreTrainedModel], object], tied: bool = False) -> Callable:
    """What plants a model after a function of this package."""

    def plant(architecture: str, folder: Path) -> None:
        make(model := model_of(architecture, tied))
        model.save_pretrained(folder)

    return plant


def _tied_by_entry(save_format: str) -> Callable[[PreTrainedModel], object]:
    return lambda model: tie(model, TyingConfig("two_way", save_format=save_format), init_from="target")


def _relaxed(save_format: str) -> Callable[[PreTrainedModel], object]:
    def make(model: PreTrainedModel) -> None:
        pair = [module_name(model, side) for side in (model.get_input_embeddings(), model.get_output_embeddings())]
        entry = {"version": 2, "groups": {"g": {"names": pair, "relax": LORA}}, "save_format": save_format}
        tie(model, TyingConfig.of(entry), init_from="mean")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "_relaxation" in name:
                    parameter += 0.1

    return make


def module_name(model: PreTrainedModel, module: torch.nn.Module) -> str:
    """The name of a module's matrix."""
    return next(f"{name}.weight" for name, each in model.named_modules() if each is module)


def names_in(folder: Path) -> Names:
    """The names that a folder's class has for both sides of the tie, as its file writes them."""
    model = ModelFacts(read_checkpoint(open_source(folder)))
    embedding, head = model.pair() or ("", "")
    keys = [key for name in (embedding, *model.stock.carriers) for key in model.checkpoint.keys_of(name)]
    # GPT-NeoX is saved under another name of its head than the live one.
    return Names(keys[0], (model.stock.keys.get(head) or [head])[0])


KINDS: dict[str, Callable[[str, Path], None]] = {
    "tied": _changed(True),
    "untied": _changed(False),
    "head missing": _changed(False, lambda folder, n: rewrite(folder, **{n.head: None})),
    "head missing, no flag": _changed(True, lambda folder, n: edit(folder, tie_word_embeddings=None)),
    "untied, no flag": _changed(False, lambda folder, n: edit(folder, tie_word_embeddings=None)),
    "embedding missing": _changed(False, lambda folder, n: rewrite(folder, **{n.embedding: None})),
    "another head": _changed(True, lambda folder, n: rewrite(folder, **{n.head: noise(tensor(folder, n.embedding))})),
    "written twice": _changed(
        True, lambda folder, n: rewrite(folder, **{n.head: tensor(folder, n.embedding).clone()})
    ),
    "equal, untied": _changed(
        False, lambda folder, n: rewrite(folder, **{n.head: tensor(folder, n.embedding).clone()})
    ),
    "stale vocabulary": _changed(True, lambda folder, n: edit(folder, vocab_size=70)),
    "dead tensor": _changed(
        True, lambda folder, n: rewrite(folder, **{"old.weight": noise(tensor(folder, n.embedding))})
    ),
    # As files of transformers 4 have it, without which some classes of mlx-lm are not made.
    "tied, rope_theta": _changed(True, lambda folder, n: edit(folder, rope_theta=10_000.0)),
    "untied, rope_theta": _changed(False, lambda folder, n: edit(folder, rope_theta=10_000.0)),
    "dedup": _held(_tied_by_entry("dedup")),
    "portable": _held(_tied_by_entry("portable")),
    "relaxed, portable": _held(_relaxed("portable")),
    "relaxed, dedup": _held(_relaxed("dedup")),
    "shared layers, portable": _held(lambda model: share_layers(model, "cycle", 1, save_format="portable"), True),
    "shared layers, dedup": _held(lambda model: share_layers(model, "cycle", 1, save_format="dedup"), True),
    "projection": _held(use_projection, True),
}


def planted(root: Path, architectures: list[str]) -> Iterator[tuple[str, str, Path]]:
    """Each kind of file of each architecture that can have it."""
    for architecture in architectures:
        for kind, plant in KINDS.items():
            folder = root / architecture / kind.replace(" ", "-").replace(",", "")
            try:
                plant(architecture, folder)
            except Exception as error:  # a class whose softmax cannot be untied, or layers that cannot be shared
                console.print(f"{architecture}, {kind}: not made ({' '.join(str(error).split())[:120]})", style="dim",
                              highlight=False, markup=False)  # fmt: skip
                continue
            yield architecture, kind, folder


def environment_of(name: str) -> Path | None:
    """The folder with a loader, installed once; `None` where that fails, with the reason printed."""
    folder, wanted = CACHE / name, ENVIRONMENTS[name][1]
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", f"{scratch}/it", *wanted]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = " ".join(done.stderr.split())[-300:]
                console.print(f"{name}: skipped, pip cannot install it: {reason}", highlight=False, markup=False)
                return None
            os.replace(f"{scratch}/it", folder)
    return folder


def outcomes(name: str, folders: list[Path]) -> dict[str, dict[str, str]] | None:
    """What a loader does with each folder; `None` where it cannot be installed or imported."""
    loader, wanted = ENVIRONMENTS[name]
    place = environment_of(name) if wanted else None
    if wanted and place is None:
        return None
    return {answer["folder"]: answer for answer in _asked(place, loader, *folders)}


def _asked(place: Path | None, *arguments: str | Path) -> list[dict]:
    """The JSON lines of the worker in an environment."""
    CACHE.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(place or ""), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("loader_worker.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CACHE, env=environment, check=False)
    if done.returncode:
        console.print(f"{arguments[0]}: ended with {done.returncode}: {done.stderr[-500:]}", style="red", markup=False)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def stale_table(write: bool) -> bool:
    """Whether the table of mlx-lm's model types is not what its classes say; it is written anew where asked for."""
    if (place := environment_of(MLX)) is None:
        return False
    (made,) = _asked(place, "mlx-table")
    path = Path(hf_tying.doctor.__file__).with_name("mlx_models.json")
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in made.pop("models").items()]
    text = json.dumps(made)[:-1] + ', "models": {\n' + ",\n".join(lines) + "\n}}\n"
    stale = not path.exists() or path.read_text(encoding="utf-8") != text
    if write:
        path.write_text(text, encoding="utf-8")
    return stale and not write


def main(
    only: Annotated[list[str] | None, typer.Option("--only", help="An architecture; all of them by default.")] = None,
    loaders: Annotated[list[str] | None, typer.Option("--with", help=f"Some of {', '.join(ENVIRONMENTS)}.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Write the table of mlx-lm's model types anew.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every answer to this file too.")] = None,
) -> None:
    """Compare the forecast with what each loader does. The exit code is 1 when they differ anywhere, else 0."""
    logging.disable(logging.WARNING)
    rows, differ = [], 0
    if stale_table(table):
        differ = 1
        console.print("mlx_models.json is not what mlx-lm's classes say: --table writes it anew.", style="red")
    with tempfile.TemporaryDirectory() as root:
        made = list(planted(Path(root), only or ARCHITECTURES))
        for name in loaders or ENVIRONMENTS:
            found, right = outcomes(name, [folder for *_, folder in made]), Counter()
            for architecture, kind, folder in made if found is not None else ():
                answer = found.get(str(folder), {"outcome": "no answer", "says": ""})
                (said,) = forecast(read_checkpoint(open_source(folder)), [ENVIRONMENTS[name][0]])
                rows.append({"loader": name, "architecture": architecture, "kind": kind, "forecast": said.outcome}
                            | answer)  # fmt: skip
                right["unknown" if said.outcome == "unknown" else said.outcome == answer["outcome"]] += 1
                if said.outcome not in ("unknown", answer["outcome"]):
                    differ += 1
                    console.print(f"{name}, {architecture}, {kind}: forecast {said.outcome}, is {answer['outcome']} "
                                  f"{answer['says'][:150]}", style="red", highlight=False, markup=False)  # fmt: skip
            if found is not None:
                told = f"{right[True]} of {sum(right.values())} as forecast, {right['unknown']} without a forecast"
                console.print(f"{name}: {told}", highlight=False)
    if json_path:
        json_path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    raise typer.Exit(bool(differ))


if __name__ == "__main__":
    typer.run(main)
