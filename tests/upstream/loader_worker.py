"""What one loader really does with folders, in an environment of its own: `python loader_worker.py LOADER FOLDER...`.

It imports the loader and nothing of this package. For each folder it prints one JSON object a line: the outcome, in
the words of the forecast, and what the loader says. `mlx-table` as loader prints the table of mlx-lm's model types.
"""

import contextlib
import dataclasses
import importlib
import json
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

# What classes call their softmax matrix in files.
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


def main() -> None:
    """Answer for each folder."""
    loader, folders = sys.argv[1], sys.argv[2:]
    if loader == "mlx-table":
        with contextlib.redirect_stdout(sys.stderr):
            table = mlx_table()
        print(json.dumps(table))
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    load = {"transformers": with_transformers, "mlx": with_mlx}[loader]
    for folder in folders:
        try:
            answer = load(Path(folder))
        except Exception as error:
            answer = {"outcome": "refuse", "says": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps({"folder": folder} | answer), flush=True)


def outcome_of(own: bool, kept: bool, equal: bool) -> str:
    """The word for a loaded softmax: of its own or not, as the file has it or not, equal to the embedding or not."""
    if not own:
        return "tie" if kept else "head dropped"
    return "duplicate" if equal else "untie"


def with_transformers(folder: Path) -> dict[str, Any]:
    """The class of the config, by its `from_pretrained`."""
    import torch
    import transformers
    from safetensors.torch import load_file

    transformers.logging.set_verbosity_error()
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    decoder = model.get_decoder() if model.config.is_encoder_decoder else model
    head, embedding = model.get_output_embeddings().weight, decoder.get_input_embeddings().weight
    places = dict(model.named_parameters(remove_duplicate=False))
    random = [name for name in report["missing_keys"] if name in places]
    if any(places[name] is head or places[name] is embedding for name in random):
        return {"outcome": "random head", "says": f"missing: {random}"}
    held = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    written = [value for name, value in held.items() if name.endswith(HEADS)]
    kept = all(torch.equal(value, head) for value in written)
    unexpected = sorted(report["unexpected_keys"])[:3]
    return {"outcome": outcome_of(head is not embedding, kept, torch.equal(head, embedding)),
            "says": f"unexpected: {unexpected}" if unexpected else ""}  # fmt: skip


def with_mlx(folder: Path) -> dict[str, Any]:
    """The class that mlx-lm has for the model type."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    held = {name: value for file in folder.glob("model*.safetensors") for name, value in mx.load(str(file)).items()}
    places = dict(tree_flatten(model.parameters()))
    head = next((value for name, value in places.items() if name.endswith(HEADS)), None)
    shape = (model.args.vocab_size, held_width(held))
    embedding = next(value for value in places.values() if value.shape == shape and value is not head)
    written = [value for name, value in held.items() if name.endswith(HEADS)]
    kept = all(bool(mx.array_equal(value, embedding if head is None else head)) for value in written)
    return {"outcome": outcome_of(head is not None, kept, head is not None and bool(mx.array_equal(head, embedding))),
            "says": ""}  # fmt: skip


def held_width(held: dict[str, Any]) -> int:
    """The width of the embedding in a file."""
    return next(value.shape[1] for name, value in held.items() if "emb" in name or "wte" in name)


def mlx_table() -> dict[str, Any]:
    """What mlx-lm's classes say of their softmax, by model type: see `hf_tying.doctor.loaders.mlx_models`."""
    import mlx_lm
    from mlx_lm.utils import MODEL_REMAPPING

    models = {}
    for path in sorted((Path(mlx_lm.__file__).parent / "models").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "\nclass Model(" not in source:
            continue
        try:
            arguments = importlib.import_module(f"mlx_lm.models.{path.stem}").ModelArgs
        except (ImportError, SystemExit):  # of one that asks for another library
            models[path.stem] = {"ties": "unknown", "drops": False, "needs": []}
            continue
        fields = {field.name: field for field in dataclasses.fields(arguments)}
        flag = fields.get("tie_word_embeddings")
        if source.count("self.lm_head = nn.Linear") > 1:  # Helium's has a head that it needs and does not use
            ties = "unknown"
        elif re.search(r"(args|config|self)\.tie_word_embeddings", source):
            default = flag is None or flag.default is dataclasses.MISSING or flag.default
            ties = "by file" if flag is None else str(bool(default)).lower()
        elif "text_config" in fields or "text_config" in source:
            ties = "unknown"
        else:
            ties = "always" if "as_linear" in source else "never"
        needs = [
            name for name, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING
        ]
        drops = re.search(r'pop\(\s*"(?:[\w.]+\.)?lm_head\.weight"', source) is not None
        models[path.stem] = {"ties": ties, "drops": drops, "needs": needs}
    return {"version": mlx_lm.__version__, "renamed": MODEL_REMAPPING, "models": models}


if __name__ == "__main__":
    main()
