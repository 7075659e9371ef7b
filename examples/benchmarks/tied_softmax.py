"""What the loss of a tied model costs: `hf_tying.losses` beside the usual path and beside other chunked losses.

    python examples/benchmarks/tied_softmax.py --quick             # the smallest shape, once, to see it run
    python examples/benchmarks/tied_softmax.py --json softmax.json --picture softmax.png
    python examples/benchmarks/tied_softmax.py --shapes 1 3 --methods naive tied --rounds 5
    python examples/benchmarks/tied_softmax.py --shape 2048,640,151936,float32
    python examples/benchmarks/tied_softmax.py --whole             # training steps of whole models

A step is `h = tanh(embedding(ids, W) @ B)`, the cross entropy of `h @ W.T`, and its backward pass to W and B, of N
tokens, width D and V words. `naive` is what transformers does (`linear`, `.float()`, `cross_entropy`); `torch_chunked`
is `torch.nn.functional.linear_cross_entropy` with its default chunks, `torch_chunked_256` with 256 rows in each;
`liger` and `cce` are those libraries behind `tied_cross_entropy`; `tied` is `tied_embedding` and `tied_cross_entropy`.
With --whole the steps are those of a GPT-2 and of a Gemma as transformers makes them, with AdamW: stock, and after
`use_tied_loss`.

Each method of each shape has a process of its own in each round, and within a round the processes follow one another,
each round in another order: what disturbs the machine hits all of them. A ratio is that to `naive` in the same round;
printed are medians over rounds. In the first round the first step, which is not timed otherwise, gives the peak of
memory above what there was before it: on a CPU of what torch allocates (the events of its profiler; scratch memory
inside a kernel is not seen), on a GPU of its allocator. `V x D` counts how many matrices of that size were alive at
once. The gradient of W is compared with a float64 one at a smaller shape (at most 256, 256 and 8192).

The floor is the time of the three matrix products alone (6NDV operations), each at the best rate of any chunking tried
here, measured in a process of its own among the others. For bfloat16 the products are tried in float32 too.

A process is stopped after --time_limit seconds. Whatever steps it has done by then count; if none, ratios to it are
bounds. Naive bfloat16 on a CPU without it may need minutes for a step: raise the limit to have the figure.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch

METHODS = ("naive", "torch_chunked", "torch_chunked_256", "liger", "cce", "tied")
#: N, D, V and dtype, with what this project has set itself: the ratio to naive in time that a release must reach, the
#: one it aims at, and the one in peak memory.
GOALS = {
    "400,200,10000,float32": (0.75, 0.68, 0.50),
    "1024,768,50257,float32": (0.75, 0.71, 0.37),
    "1024,768,50257,bfloat16": (0.80, 0.65, 0.31),
    "4096,512,32000,float32": (0.80, 0.79, 0.10),
    "512,1152,262144,bfloat16": (0.83, 0.70, 0.39),
}

#: What is asked of a method once, and why there are figures missing.
MEASURED_ONCE = (
    *("peak_bytes", "model_peak_bytes", "matrices", "gradient_error", "loss_difference"),
    *("products", "chunkings", "all_chunkings"),
    *("failed", "over_limit", "at_least_seconds"),
)


@dataclass
class Arguments:
    shapes: list[str] | None = field(
        default=None,
        metadata={
            "aliases": ["--shape"],
            "help": f"N,D,V,dtype, or a number from 0 to {len(GOALS) - 1}: {'; '.join(GOALS)}. Default: all of these, "
            "or none with --whole.",
        },
    )
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": ", ".join(METHODS)})
    whole: bool = field(default=False, metadata={"help": "Training steps of whole models."})
    layers: int = field(default=12, metadata={"help": "Of the GPT-2; the Gemma has 2."})
    length: int = field(default=512, metadata={"help": "Tokens in the one sequence of a whole training step."})
    rounds: int = field(default=3, metadata={"help": "Processes of each method."})
    steps: int = field(default=5, metadata={"help": "Timed steps in each process; more of short ones."})
    time_limit: float = field(default=120, metadata={"help": "Seconds that a process may take."})
    quick: bool = field(default=False, metadata={"help": "One round of two steps, short; unless given, shape 0 only."})
    use_cpu: bool = field(default=False, metadata={"help": "Not the GPU, if there is one."})
    seed: int = field(default=0, metadata={"help": "Of weights, ids and labels."})
    json: str | None = field(default=None, metadata={"help": "Write all numbers to this file, after each round."})
    picture: str | None = field(default=None, metadata={"help": "Draw the ratios into this file."})


def problems_of(arguments: Arguments) -> dict[str, dict]:
    """What is measured, by name; the values are a part of the jobs of worker processes."""
    problems = {}
    for text in arguments.shapes or ([] if arguments.whole else [*GOALS][: 1 if arguments.quick else None]):
        name = [*GOALS][int(text)] if text.isdigit() and int(text) < len(GOALS) else text
        try:
            *sizes, dtype = name.split(",")
            n, d, v = (int(size) for size in sizes)
            if min(n, d, v) < 1 or not getattr(torch, dtype).is_floating_point:
                raise ValueError
        except (ValueError, AttributeError):
            sys.exit(f"error: {text!r} is no shape: expected N,D,V,dtype, or a number from 0 to {len(GOALS) - 1}.")
        problems[name] = {"shape": [n, d, v, dtype]}
    if arguments.whole:
        for model, layers in (("GPT-2", arguments.layers), ("Gemma", 2)):
            name = f"{model}, {layers} layers, {arguments.length} tokens"
            problems[name] = {"whole": model, "layers": layers, "length": arguments.length}
    return problems


def run_worker(job: dict) -> dict:
    """One process: its events, put together. `failed` says why there are none, `over_limit` that it was stopped."""
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    result = {"seconds": [], "cpu_seconds": []}
    try:
        out, err = process.communicate(timeout=job["limit"])
    except subprocess.TimeoutExpired:
        process.kill()
        stopped, result["over_limit"] = time.time(), True
        out, err = process.communicate()
    for line in out.splitlines():
        event = json.loads(line) if line.startswith('{"') else {}  # torch's profiler may print lines of its own
        for key in ("seconds", "cpu_seconds"):
            result[key] += [event.pop(key)] if key in event else []
        result.update(event)
    if result.get("over_limit"):
        if "began" in result and "first_seconds" not in result:
            result["at_least_seconds"] = stopped - result["began"]
    elif process.returncode:
        last = err.strip().splitlines()[-1:] or [""]
        result.setdefault("failed", f"exit code {process.returncode}: {last[0]}")
    return result


def measure(problems: dict, arguments: Arguments, device: str, after_round) -> None:
    """All rounds; `after_round` gets the results so far: problem -> method -> round -> what `run_worker` returns."""
    results = {problem: {} for problem in problems}
    for turn in range(arguments.rounds):
        for problem, part in problems.items():
            methods = ["naive", *(m for m in arguments.methods if m != "naive" and ("shape" in part or m == "tied"))]
            methods += ["floor"] * ("shape" in part)
            first = turn % len(methods)
            for method in methods[first:] + methods[:first]:
                done = results[problem].setdefault(method, {})
                if any(result.keys() & {"failed", "over_limit"} for result in done.values()):
                    continue  # it would be no better this time
                job = part | {"method": method, "device": device, "seed": arguments.seed, "steps": arguments.steps}
                began = time.monotonic()
                done[turn] = run_worker(job | {"limit": arguments.time_limit, "first_round": not done})
                print(
                    f"round {turn + 1} of {arguments.rounds}, {problem}, {method}: {time.monotonic() - began:.0f} s",
                    file=sys.stderr,
                )
        after_round(results)


def summary(results: dict) -> list[dict]:
    """One row for each method of each problem."""
    rows = []
    for problem, methods in results.items():
        times = {
            method: {turn: seconds for turn, result in done.items() if (seconds := _seconds(result))}
            for method, done in methods.items()
        }
        for method, done in methods.items():
            row = {"problem": problem, "method": method, "rounds": []}
            for turn, seconds in times[method].items():
                own = {"round": turn, "median_seconds": seconds, "steps": len(done[turn]["seconds"])}
                for name, base in (("ratio", "naive"), ("to_floor", "floor")):
                    if turn in times.get(base, {}):
                        own[name] = seconds / times[base][turn]
                own["cpu_seconds"] = median(done[turn]["cpu_seconds"] or [done[turn].get("first_cpu_seconds", 0.0)])
                row["rounds"].append(own)
            for name in ("median_seconds", "cpu_seconds", "ratio", "to_floor"):
                values = [own[name] for own in row["rounds"] if name in own]
                row[name] = median(values) if values else None
            row["steps"] = sum(own["steps"] for own in row["rounds"])
            merged = {key: value for result in done.values() for key, value in result.items()}
            for name in MEASURED_ONCE:
                row[name] = merged.get(name)
            rows.append(row)
        _compare(rows[-len(methods) :])
    return rows


def _seconds(result: dict) -> float | None:
    """Of a step in one process; the first step counts where there is no other."""
    return median(result["seconds"]) if result["seconds"] else result.get("first_seconds")


def _compare(rows: list[dict]) -> None:
    """Ratios to naive of what each method is asked for once; goals."""
    naive = next(row for row in rows if row["method"] == "naive")
    for row in rows:
        for name in ("peak_bytes", "model_peak_bytes", "gradient_error"):
            ratio = row[name] / naive[name] if row[name] and naive[name] else None
            row[name.removesuffix("_bytes") + "_ratio"] = ratio
        row["ratio_below"] = None
        if row["median_seconds"] and not naive["median_seconds"] and naive["at_least_seconds"]:
            row["ratio_below"] = row["median_seconds"] / naive["at_least_seconds"]
        if row["method"] == "tied" and row["problem"] in GOALS:
            must, aim, peak = GOALS[row["problem"]]
            row["goals"] = {
                "time_must": [must, _met(row["ratio"], row["ratio_below"], must)],
                "time_goal": [aim, _met(row["ratio"], row["ratio_below"], aim)],
                "peak_goal": [peak, _met(row["peak_ratio"], None, peak)],
            }


def _met(ratio: float | None, below: float | None, goal: float) -> str:
    if ratio is not None:
        return "met" if ratio <= goal else "missed"
    return "met" if below is not None and below <= goal else "not known"


def show(tables: Iterable, notes: Iterable[str]) -> None:
    """Print tables of `rich` in full width, also where the output is no terminal, and lines below them."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    for table in tables:
        Console(width=max(console.width, 160)).print(table)
    for note in notes:
        console.print(note)


def machine(device: str) -> dict:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    native = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "cpu": names[0] if names else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_has_bfloat16": native is not None and bool(native()),
    }


def main():
    from tied_softmax_report import draw, notes, tables
    from transformers import HfArgumentParser

    from hf_tying._extras import MissingLibraryError, require
    from hf_tying.training.command_line import HelpFormatter

    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    (arguments,) = parser.parse_args_into_dataclasses()
    for method in arguments.methods:
        if method not in METHODS:
            sys.exit(f"error: unknown method {method!r}: expected one of {', '.join(METHODS)}.")
    for flag, file in (("json", arguments.json), ("picture", arguments.picture)):
        if file and not Path(file).parent.is_dir():
            sys.exit(f"error: --{flag} {file}: there is no folder {str(Path(file).parent)!r}. Make it first.")
    if arguments.picture:
        try:
            require("matplotlib.figure", "--picture", "plots")
        except MissingLibraryError as error:
            sys.exit(f"error: {error}")
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 2
        arguments.layers, arguments.length = 1, min(arguments.length, 64)
    device = "cuda" if torch.cuda.is_available() and not arguments.use_cpu else "cpu"
    report = {"arguments": asdict(arguments), "machine": machine(device), "goals": GOALS}

    def after_round(results):
        report["rows"] = summary(results)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    measure(problems_of(arguments), arguments, device, after_round)
    show(tables(report), notes(report))
    if arguments.picture:
        draw(report, Path(arguments.picture))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        from tied_softmax_worker import work

        work(json.loads(sys.argv[2]))
    else:
        main()
