"""The table of the zoo: for each class, what a forward pass uses, beside the roles that the library reads."""

import argparse
import json
import time
import warnings
from dataclasses import asdict

import torch
import transformers

from hf_tying.ties.anatomy import Anatomy

from .processes import TooSlow, at_most
from .zoo import CannotBuild, build, classes
from .zoo_configs import vocabulary_sizes
from .zoo_inputs import inputs
from .zoo_use import is_over, used

SECONDS = 8


def row(name: str) -> dict:
    """Facts about one class: `built`, `ran`, `error`, `seconds`, `over` (names over a vocabulary), `use`, `roles`."""
    found = {"class": name, "type": getattr(transformers, name).config_class.model_type, "built": False, "ran": False}
    start = time.monotonic()
    try:
        with at_most(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _fill(found)
    except (Exception, TooSlow) as error:
        reason = str(error) if isinstance(error, CannotBuild) else f"{type(error).__name__}: {error}"
        found["error"] = " ".join(reason.split())[:300]
    return {**found, "seconds": round(time.monotonic() - start, 2)}


def _fill(found: dict) -> None:
    model = build(found["class"])
    found["built"] = True
    sizes = set(vocabulary_sizes(model.config).values())
    slots = model.named_parameters(remove_duplicate=False)
    found["over"] = [name for name, slot in slots if is_over(slot, sizes)]
    anatomy = Anatomy(model)
    found["roles"] = {role: [part.name, *part.carriers] for role, part in anatomy.roles.items()}
    found["declarable"] = anatomy.declarable
    use = asdict(used(model, inputs(model)))
    found["use"] = json.loads(json.dumps(use, default=sorted))
    found["ran"] = True


def misread(found: dict) -> list[str]:
    """What the library's reading of a model says otherwise than a forward pass that used it.

    Names that are over no vocabulary of the config say nothing: a head of one row less, an embedding with more.
    """
    use = found["use"]
    lookups, products = set(use["lookups"]), {*use["products"], *use["dead_products"]}
    problems = []
    for role, (name, *carriers) in found["roles"].items():
        if name in found["over"] and name not in (products if role == "output" else lookups):
            problems.append(f"{role} {name} is not used as one")
        problems += [f"{name} is used, and counts as a carrier" for name in carriers if name in lookups | products]
    return problems


def line(found: dict) -> str:
    """One row of the table: the class, whether it was built and run, the seconds, and the names by their use."""
    marks = f"{'built' if found['built'] else '-':5} {'ran' if found['ran'] else '-':3} {found['seconds']:5.2f}"
    if "use" not in found:
        return f"{found['class']:55} {marks}  {found.get('error', '')}"
    use = found["use"]
    looked_up = [f"{name} <- {'+'.join(fed) or '?'}" for name, fed in use["lookups"].items()]
    parts = {"lookups": looked_up, **{kind: use[kind] for kind in ("products", "dead_products", "idle")}}
    told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in parts.items() if names)
    return f"{found['class']:55} {marks}  {told}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--json", help="also write all rows to this file")
    parser.add_argument("names", nargs="*", help="classes; default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = []
    for name in arguments.names or classes():
        rows.append(row(name))
        print(line(rows[-1]), flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)
    built, ran = (sum(found[key] for found in rows) for key in ("built", "ran"))
    print(f"{len(rows)} classes, {built} built, {ran} run, {sum(found['seconds'] for found in rows):.0f} s")
