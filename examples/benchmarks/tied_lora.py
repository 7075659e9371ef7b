"""What Tied-LoRA costs beside LoRA and VeRA of the same rank, on the query, key and value of a Llama.

    python examples/benchmarks/tied_lora.py                       # a small Llama, about a minute on a CPU
    python examples/benchmarks/tied_lora.py --hidden_size 4096 --layers 32 --dtype bfloat16 --length 512 --json a.json

Measured in one run, the methods taking turns, each turn in another order: the seconds of a training step (forward,
backward, AdamW), as medians and as a ratio to LoRA's step of the same turn, with quartiles; the bytes that autograd
saves for the backward pass, each storage once, parameters not; on a GPU the peak of the allocator above what the
models themselves take. Then inference of the merged model against the base model, in the same way. Last, for the
shapes of LLaMA2-7B, without its weights: trained parameters and the size of the adapter's file.

On a busy machine --clock cpu counts the seconds of this process alone.
"""

import copy
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from peft import LoraConfig, VeraConfig, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, set_seed
from transformers.utils import logging

from hf_tying.peft import TiedLoraConfig
from hf_tying.training.command_line import HelpFormatter
from hf_tying.training.memory import saved_activations

METHODS = ("TL6", "TL5", "lora", "vera")
TARGETS = ["q_proj", "k_proj", "v_proj"]


@dataclass
class Arguments:
    hidden_size: int = field(default=256, metadata={"help": "Width."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Of the MLP; default: 2.75 times the width."}
    )
    layers: int = field(default=4, metadata={"help": "Number of layers."})
    heads: int = field(default=4, metadata={"help": "Number of heads, of queries, keys and values alike."})
    vocab_size: int = field(default=1024, metadata={"help": "Rows of the embedding."})
    batch_size: int = field(default=4, metadata={"help": "Sequences in a batch."})
    length: int = field(default=128, metadata={"help": "Tokens of a sequence."})
    r: int = field(default=8, metadata={"help": "Rank of all methods; also of the LLaMA2-7B adapter."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapters' input."})
    dtype: str = field(default="float32", metadata={"help": "Of the base model; adapters are float32 under autocast."})
    steps: int = field(default=40, metadata={"help": "Turns that are measured."})
    warmup: int = field(default=5, metadata={"help": "Turns before that."})
    clock: str = field(default="wall", metadata={"help": "Seconds on the wall, or cpu.", "choices": ["wall", "cpu"]})
    use_cpu: bool = field(default=False, metadata={"help": "Not the GPU, if there is one."})
    seed: int = field(default=0, metadata={"help": "Of weights and data."})
    json: str | None = field(default=None, metadata={"help": "Write all numbers to this file."})


def config_of(method: str, r: int, dropout: float = 0.0):
    """The PEFT config of a method, over the same modules."""
    same = {"r": r, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if method == "lora":
        return LoraConfig(lora_alpha=r, lora_dropout=dropout, **same)
    if method == "vera":
        return VeraConfig(vera_dropout=dropout, **same)
    return TiedLoraConfig(variant=method, dropout=dropout, **same)


class Clock:
    """Seconds of a call, to its end on the device."""

    def __init__(self, device: torch.device, kind: str):
        self.device = device
        self.now = time.process_time if kind == "cpu" else time.perf_counter

    def __call__(self, call) -> float:
        self._wait()
        start = self.now()
        call()
        self._wait()
        return self.now() - start

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def turns(calls: dict, clock: Clock, warmup: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each call in each turn; who begins changes, so that nobody always runs on another's warm cache."""
    names, seconds = list(calls), {name: [] for name in calls}
    for turn in range(warmup + steps):
        first = turn % len(names)
        order = names[first:] + names[:first]
        for name in order if turn // len(names) % 2 == 0 else reversed(order):
            taken = clock(calls[name])
            if turn >= warmup:
                seconds[name].append(taken)
    return seconds


def against(seconds: dict[str, list[float]], base: str) -> dict[str, dict]:
    """Median seconds, and the ratios to `base` of the same turn: median and quartiles."""
    rows = {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows[name] = {"median_seconds": statistics.median(own), "ratio": middle, "ratio_quartiles": [low, high]}
    return rows


def training(base, ids, arguments, clock) -> tuple[dict[str, dict], dict]:
    """Training steps of all methods, and the models after them."""
    models, calls, memory = {}, {}, {}
    half = arguments.dtype != "float32"
    for method in METHODS:
        set_seed(arguments.seed)
        model = models[method] = get_peft_model(copy.deepcopy(base), config_of(method, arguments.r, arguments.dropout))
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

        def loss_of(model=model):
            with torch.autocast(ids.device.type, base.dtype, enabled=half):
                return model(input_ids=ids, labels=ids, use_cache=False).loss

        def step(loss_of=loss_of, optimizer=optimizer):
            loss_of().backward()
            optimizer.step()
            optimizer.zero_grad()

        calls[method] = step
        with saved_activations(model) as saved:
            loss = loss_of()  # noqa: F841, it holds what was saved
        memory[method] = {"saved_bytes": saved.bytes}
        del loss, saved
        step()
        if ids.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            memory[method]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    rows = against(turns(calls, clock, arguments.warmup, arguments.steps), "lora")
    return {method: rows[method] | memory[method] for method in METHODS}, models


@torch.no_grad()
def inference(base, tuned, ids, arguments, clock) -> dict:
    """The merged model against the base model, and how far the merge is from the adapter."""
    base, tuned = base.eval(), tuned.eval()
    before = tuned(input_ids=ids, use_cache=False).logits
    merged = tuned.merge_and_unload()
    difference = (merged(input_ids=ids, use_cache=False).logits - before).abs().max().item()
    calls = {"base": lambda: base(input_ids=ids), "merged": lambda: merged(input_ids=ids)}
    rows = against(turns(calls, clock, arguments.warmup, arguments.steps), "base")
    return rows["merged"] | {"base_median_seconds": rows["base"]["median_seconds"], "max_difference": difference}


def llama2_7b(r: int) -> dict[str, dict]:
    """Trained parameters, and bytes of the file, on the shapes of LLaMA2-7B; only the adapter's tensors are made.

    The paper's LoRA adapts the fused q, k and v: one A for the three, 4Ldr parameters in place of 6Ldr.
    """
    rows, config = {}, LlamaConfig()  # whose defaults are LLaMA's at 7B
    fused = 4 * config.num_hidden_layers * config.hidden_size * r
    for method in METHODS:
        with torch.device("meta"):
            model = get_peft_model(LlamaForCausalLM(config), config_of(method, r), low_cpu_mem_usage=True)
        state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in get_peft_model_state_dict(model).items()}
        rows[method] = {
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "file_bytes": len(safetensors.torch.save(state, metadata={"format": "pt"})),
        }
    for row in rows.values():
        row["of_lora"] = row["parameters"] / rows["lora"]["parameters"]
        row["of_fused_lora"] = row["parameters"] / fused
        row["file_beside_parameters"] = row["file_bytes"] - 4 * row["parameters"]
    return rows


def tables(report: dict) -> list[Table]:
    """What is printed."""
    on_gpu = report["device"] != "cpu"
    steps = Table(title=f"Training step, r = {report['arguments']['r']}, on {report['device']}, a ratio to LoRA's")
    columns = ["", "median", "ratio", "quartiles", "saved for backward", "ratio"]
    for column in columns + ["peak", "ratio"] * on_gpu:
        steps.add_column(column, justify="right" if column else "left")
    lora = report["training"]["lora"]
    for method, row in report["training"].items():
        cells = [method, f"{row['median_seconds'] * 1e3:.2f} ms", f"{row['ratio']:.3f}"]
        cells += ["{:.3f} to {:.3f}".format(*row["ratio_quartiles"])]
        for key in ["saved_bytes"] + ["peak_bytes"] * on_gpu:
            cells += [f"{row[key] / 2**20:.2f} MiB", f"{row[key] / lora[key]:.4f}"]
        steps.add_row(*cells)
    sizes = Table(title=f"LLaMA2-7B, r = {report['arguments']['r']}, q, k and v")
    for column in ("", "parameters", "of LoRA", "of LoRA, q k v fused", "file", "beside 4 B a parameter"):
        sizes.add_column(column, justify="right" if column else "left")
    for method, row in report["llama2_7b"].items():
        cells = f"{row['parameters']:,}", f"{row['of_lora']:.2%}", f"{row['of_fused_lora']:.2%}"
        sizes.add_row(method, *cells, f"{row['file_bytes']:,} B", f"{row['file_beside_parameters']:,} B")
    return [steps, sizes]


def main():
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    (arguments,) = parser.parse_args_into_dataclasses()
    logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.use_cpu else "cpu")
    if device.type == "cuda" and arguments.clock == "cpu":
        sys.exit("error: --clock cpu does not see the GPU's work: expected --clock wall.")
    set_seed(arguments.seed)
    config = LlamaConfig(
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size or arguments.hidden_size * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        vocab_size=arguments.vocab_size,
        max_position_embeddings=max(arguments.length, 128),
    )
    base = LlamaForCausalLM(config).to(device, getattr(torch, arguments.dtype))
    ids = torch.randint(arguments.vocab_size, (arguments.batch_size, arguments.length), device=device)
    clock = Clock(device, arguments.clock)
    rows, models = training(base, ids, arguments, clock)
    report = {
        "arguments": asdict(arguments),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "training": rows,
        "inference": inference(base, models["TL6"], ids, arguments, clock),
        "llama2_7b": llama2_7b(arguments.r),
    }
    console = Console(soft_wrap=True)
    for table in tables(report):
        Console(width=max(console.width, 110)).print(table)
    merged = report["inference"]
    low, high = merged["ratio_quartiles"]
    console.print(
        f"Inference of the merged TL6: {merged['median_seconds'] * 1e3:.2f} ms, {merged['ratio']:.3f} of the base "
        f"model's ({low:.3f} to {high:.3f}); its logits differ from the adapter's by {merged['max_difference']:.1e}"
    )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
