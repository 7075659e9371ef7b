"""Importing the package alone changes nothing, bit for bit: `python -m tests.upstream.import_alone`."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parents[2]
#: What takes a model apart from another of its architecture: heads over words first, then whatever comes.
KINDS = ("ForConditionalGeneration", "ForCausalLM", "ForMaskedLM", "LMHeadModel", "ForPreTraining", "Model")
#: What differs from run to run by itself.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def main(
    count: Annotated[int, typer.Option("--architectures", help="How many of them.")] = 200,
    only: Annotated[list[str] | None, typer.Option("--only", help="A class, instead.")] = None,
    answer: Annotated[bool, typer.Option(hidden=True)] = False,
    imported: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Compare weights, outputs, losses, gradients and files of stock models with and without `import hf_tying`.

    Two processes make the same models from the same seeds. The exit code is 1 when a bit differs, else 0.
    """
    if answer:
        _answer(only, imported)
        return
    names = only or architectures(count)
    found = list(compare(names))
    for name, what in found:
        typer.secho(f"{name}: {what}", fg="red")
    typer.echo(f"{len(names)} architectures with and without `import hf_tying`: {len(found)} differences")
    raise typer.Exit(bool(found))


def architectures(count: int) -> list[str]:
    """The names of `count` classes that run, each of another architecture, those with ties of their own first."""
    import transformers

    from .. import zoo
    from .lives import outputs

    def rank(name: str) -> tuple:
        kind = next((i for i, kind in enumerate(KINDS) if name.endswith(kind)), len(KINDS))
        return not getattr(transformers, name)._tied_weights_keys, kind, name

    chosen: dict[str, str] = {}
    for name in sorted(zoo.classes(), key=rank):
        model_type = getattr(transformers, name).config_class.model_type
        if len(chosen) < count and model_type not in chosen:
            try:
                model = zoo.build(name)
                type(model.config).from_dict(model.config.to_dict())  # some are made that no file can hold
            except Exception:
                continue
            small = sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
            if small and isinstance(outputs(model), list):  # it runs
                chosen[model_type] = name
    return list(chosen.values())


def compare(names: list[str]) -> Iterator[tuple[str, str]]:
    """Each class whose models differ, with the first things in which they do."""
    with_import, without = (_answers(names, imported) for imported in (True, False))
    for name in names:
        ours, theirs = with_import.get(name), without.get(name)
        if ours is None or ours != theirs:
            differing = [key for key in theirs or {} if (ours or {}).get(key) != theirs[key]]
            yield name, f"{differing[:3]} differ" if differing else f"answers {ours}, and {theirs}"


def _answers(names: list[str], imported: bool) -> dict[str, dict]:
    command = [sys.executable, "-W", "ignore", "-m", f"{__package__}.import_alone", "--answer"]
    command += ["--imported"] * imported + [word for name in names for word in ("--only", name)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        which = "with" if imported else "without"
        raise RuntimeError(f"The process {which} the import failed:\n{done.stderr[-2000:]}")
    return {name: facts for line in done.stdout.splitlines() for name, facts in json.loads(line).items()}


def _answer(names: list[str], imported: bool) -> None:
    if imported:
        import hf_tying  # noqa: F401
    import torch

    torch.set_num_threads(1)
    for name in names:
        try:
            found = digests(name)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps({name: found}), flush=True)
    assert imported == ("hf_tying" in sys.modules)


def digests(name: str) -> dict[str, str]:
    """By what it is of, a digest: a model's weights, its outputs and loss, its gradients, and its files; then the same
    of the model that is loaded from these, and of that one resized."""
    import torch

    from .. import zoo
    from ..zoo_configs import words_of

    with tempfile.TemporaryDirectory() as folder:
        model = zoo.build(name)
        found = _of_model(model, "made", Path(folder) / "made")
        model = type(model).from_pretrained(Path(folder) / "made")
        found |= _of_model(model, "loaded", Path(folder) / "loaded")
        torch.manual_seed(0)
        try:
            model.resize_token_embeddings(words_of(model.config) + 5)
        except Exception as error:
            return found | {"resized": f"{type(error).__name__}: {error}"}
        return found | _of_model(model, "resized", Path(folder) / "resized")


def _of_model(model, stage: str, folder: Path) -> dict[str, str]:
    import torch

    from .. import zoo
    from .lives import tensors

    torch.manual_seed(0)
    found = {f"{stage}: {key}": _digest(value) for key, value in model.state_dict().items()}
    found[f"{stage}: class"] = f"{type(model).__mro__} {sorted(vars(model))}"
    try:
        answers = tensors(model.train()(**zoo.inputs(model, labels=True)))
        for i, answer in enumerate(answers):
            found[f"{stage}: output {i}"] = _digest(answer)
        sum(answer.float().sin().sum() for answer in answers).backward()
    except Exception as error:
        found[f"{stage}: error"] = f"{type(error).__name__}: {error}"
    for key, parameter in model.named_parameters(remove_duplicate=False):
        found[f"{stage}: gradient of {key}"] = "none" if parameter.grad is None else _digest(parameter.grad)
    model.zero_grad()
    model.save_pretrained(folder)
    for path in sorted(folder.iterdir()):
        found[f"{stage}: file {path.name}"] = sha256(path.read_bytes().replace(bytes(folder), b"")).hexdigest()
    return found


def _digest(tensor) -> str:
    tensor = tensor.detach()
    return f"{tuple(tensor.shape)} {sha256(tensor.contiguous().cpu().double().numpy().tobytes()).hexdigest()}"


if __name__ == "__main__":
    typer.run(main)
