r"""ULMFiT with and without each of its parts: the error of a classifier from scratch and from a language model.

    python examples/benchmarks/ulmfit.py --pretrain_file wikitext-2/train.txt --train_file trec6/train.tsv \
        --test_file trec6/test.tsv --seeds 0 1 2 --json results.json

The language model of `--pretrain_file` is trained once (or taken from `--pretrained_lm`), with the first seed. All
runs start from it. What follows it has the seed of its run. Further flags are those of `run_ulmfit.py`.
"""

import argparse
import json
import runpy
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

SCRIPT = Path(__file__).parents[1] / "run_ulmfit.py"
VARIANTS = {
    "from scratch": ("no_pretrain", "no_lm_tuning", "no_discriminative_rates", "no_gradual_unfreezing"),
    "ULMFiT": (),
    "without LM tuning": ("no_lm_tuning",),
    "without pretraining": ("no_pretrain",),
    "without slanted triangular rates": ("no_slanted_triangular",),
    "without discriminative rates": ("no_discriminative_rates",),
    "without gradual unfreezing": ("no_gradual_unfreezing",),
    "without concat pooling": ("no_concat_pooling",),
}
#: Parts of the last stage alone: the tuned language model is that of the whole run.
LAST_STAGE = {"no_gradual_unfreezing", "no_concat_pooling"}


def run(flags: list[str], output: Path) -> dict:
    """The results of `run_ulmfit.py` in this process, and its minutes."""
    start = time.time()
    sys.argv = [str(SCRIPT), *flags, "--output_dir", str(output)]
    runpy.run_path(str(SCRIPT))["main"]()
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return results | {"minutes": (time.time() - start) / 60}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    first_stage = parser.add_mutually_exclusive_group(required=True)
    first_stage.add_argument("--pretrain_file")
    first_stage.add_argument("--pretrained_lm")
    parser.add_argument("--test_file", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path)
    arguments, others = parser.parse_known_args()
    others += ["--test_file", arguments.test_file]
    sys.path.insert(0, str(SCRIPT.parent))
    errors: dict[str, list[float]] = {}
    runs = []
    with tempfile.TemporaryDirectory() as work:
        language_model = arguments.pretrained_lm
        if language_model is None:
            flags = [*others, "--pretrain_file", arguments.pretrain_file, "--no_lm_tuning", "--epochs", "1"]
            run([*flags, "--seed", str(arguments.seeds[0])], Path(work) / "first")
            language_model = str(Path(work) / "first" / "lm")
        for seed in arguments.seeds:
            for variant in arguments.variants:
                without = VARIANTS[variant]
                source = [] if "no_pretrain" in without else ["--pretrained_lm", language_model]
                flags = [*others, *source, *(f"--{flag}" for flag in without), "--seed", str(seed)]
                output, whole = (Path(work) / f"{name.replace(' ', '_')}_{seed}" for name in (variant, "ULMFiT"))
                if without and {*without} <= LAST_STAGE and whole.is_dir():
                    for stage in ("lm", "lm_tuned"):
                        shutil.copytree(whole / stage, output / stage)
                results = run(flags, output)
                errors.setdefault(variant, []).append(100 * (1 - results["test"]["accuracy"]))
                figures = {name: results["test"][name] for name in ("accuracy", "macro_f1", "ece", "ece_before")}
                runs.append({"variant": variant, "seed": seed, "minutes": results["minutes"], **figures})
                print(json.dumps(runs[-1]), flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps({"flags": others, "runs": runs}, indent=1) + "\n")
    table = Table(title="Error on the test texts, percent")
    for column in ("", "mean", "standard deviation", "seeds"):
        table.add_column(column, justify="right" if column else "left")
    for variant, found in errors.items():
        spread = f"{statistics.stdev(found):.2f}" if len(found) > 1 else "-"
        table.add_row(variant, f"{statistics.mean(found):.2f}", spread, str(len(found)))
    Console().print(table)


if __name__ == "__main__":
    main()
