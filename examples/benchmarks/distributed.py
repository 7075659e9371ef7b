"""What a tie saves when several processes train one model: bytes sent, optimizer state, peak memory, time of a step.

    python examples/benchmarks/distributed.py --quick                                 # small, to see it run
    python examples/benchmarks/distributed.py --processes 1 2 4 --json distributed.json

A Llama of 30,000 words is trained untied, tied two ways, and tied with `use_tied_loss`: by one process, and by several
under DistributedDataParallel and under FSDP2 (each layer a unit), as `Accelerator.prepare` makes them. The models are
in the same processes, and in each round each takes a step, in another order. A ratio is that to the untied model
in the same round, with the same engine and number of processes; printed are medians over the rounds. Every process has
a batch of its own, so that more processes do more work.

Bytes are those of the tensors that DDP reduces, counted by a communication hook, and that FSDP2 gathers and scatters,
counted as they are dispatched. Beside them is what `parallel_plan` says. The optimizer is AdamW; its bytes are those
of one process. The peak is of all that torch allocates in process 0, from the making of a model to its second step.

Below are models of papers at 8, 64 and 1,024 GPUs, by the arithmetic of `parallel_plan` from their configs: nothing of
that is run.

Processes are forked, and joined by gloo on the CPU, one thread each. Linux and macOS only.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from rich.table import Table
from tied_softmax import machine, show
from tied_softmax_worker import memory_of
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    PreTrainedModel,
)
from transformers.utils import logging

from hf_tying import assert_tied, tie, use_tied_loss
from hf_tying.parallel import parallel_plan
from hf_tying.training.command_line import HelpFormatter

METHODS, GPUS = ("untied", "tied", "tied loss"), (8, 64, 1024)
#: The axis of `parallel_plan` that an engine spreads a model over.
AXES = {"DDP": "dp", "FSDP2": "fsdp"}
#: Published models, by class and config.
PAPERS = {
    "Llama-3.2-1B": (LlamaForCausalLM, LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )),
    "Gemma-3-1B": (Gemma3ForCausalLM, Gemma3TextConfig(
        vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, tie_word_embeddings=True,
    )),
    "NLLB-200-distilled-600M": (M2M100ForConditionalGeneration, M2M100Config(
        vocab_size=256206, d_model=1024, encoder_layers=12, decoder_layers=12, encoder_ffn_dim=4096,
        decoder_ffn_dim=4096, encoder_attention_heads=16, decoder_attention_heads=16, tie_word_embeddings=True,
    )),
}  # fmt: skip


@dataclass
class Arguments:
    processes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Numbers of processes to try."})
    vocab_size: int = field(default=30_000, metadata={"help": "Words of the model."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the model."})
    layers: int = field(default=2, metadata={"help": "Layers of the model."})
    rows: int = field(default=4, metadata={"help": "Sequences of a process in a step, of 64 tokens each."})
    rounds: int = field(default=5, metadata={"help": "Timed steps of each model."})
    seed: int = field(default=0, metadata={"help": "Of weights and tokens."})
    quick: bool = field(default=False, metadata={"help": "One round of a small model."})
    json: str | None = field(default=None, metadata={"help": "Write all numbers to this file."})


def model_of(method: str, arguments: Arguments) -> PreTrainedModel:
    torch.manual_seed(arguments.seed)
    width = arguments.hidden_size
    config = LlamaConfig(
        vocab_size=arguments.vocab_size, hidden_size=width, intermediate_size=2 * width, num_attention_heads=4,
        num_hidden_layers=arguments.layers, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = tie(LlamaForCausalLM(config), "none" if method == "untied" else "two_way", init_from="output")
    return use_tied_loss(model) if method == "tied loss" else model


def accelerator_of(engine: str) -> Accelerator:
    """An `Accelerator` of the processes at hand. It has no FSDP on a CPU, so its state is told that it has."""
    AcceleratorState._reset_state(), GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    if engine == "FSDP2":
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
            reshard_after_forward=True,
        )  # fmt: skip
    elif dist.is_initialized():
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    return accelerator


class SentBytes(TorchDispatchMode):
    """The bytes of the whole tensors that DDP reduces, and that FSDP2 gathers and scatters, while it is in `with`."""

    KINDS = ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_")

    def __init__(self, wrapped: torch.nn.Module) -> None:
        super().__init__()
        self.total = 0
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.register_comm_hook(None, self.reduce)

    def reduce(self, group: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.total += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in self.KINDS:
            self.total += max(each.nbytes for each in args if isinstance(each, torch.Tensor))
        return function(*args, **(kwargs or {}))


class Run:
    """A model with its optimizer, as an engine has wrapped them, and what its first two steps have shown."""

    def __init__(self, method: str, engine: str, arguments: Arguments) -> None:
        size = dist.get_world_size() if dist.is_initialized() else 1
        generator = torch.Generator().manual_seed(size * arguments.seed + (dist.get_rank() if size > 1 else 0))
        ids = torch.randint(arguments.vocab_size, (arguments.rows, 64), generator=generator)
        self.inputs = {"input_ids": ids, "labels": ids}
        with memory_of("cpu", None) as memory:
            model = model_of(method, arguments)
            self.accelerator = accelerator_of(engine)
            self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
            sent = SentBytes(self.model)
            self.step()
            sent.total = 0  # the first step of DDP is as it is in the order of the parameters
            with sent:
                self.step()
        assert_tied(self.model)
        if size > 1:
            wanted = DistributedDataParallel if engine == "DDP" else FSDPModule
            assert isinstance(self.model, wanted), f"Expected {engine}, found {type(self.model).__name__}."
        own = [getattr(p, "_local_tensor", p) for p in self.model.parameters()]
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        states = [getattr(value, "_local_tensor", value) for value in states if isinstance(value, torch.Tensor)]
        plan = parallel_plan(model_of(method, arguments), {AXES[engine]: size}) if size > 1 else None
        collectives = [each for group in plan.groups for each in group.collectives] if plan else []
        self.found = {
            "processes": size,
            "engine": engine,
            "method": method,
            "parameter_bytes": sum(p.nbytes for p in own),
            "optimizer_bytes": sum(value.nbytes for value in states if value.ndim),
            "counted_bytes": sent.total,
            "planned_bytes": sum(each.payload for each in collectives),
            "sent_by_a_process_in_a_ring": plan.sent if plan else 0,
            "peak_bytes": memory["peak_bytes"],
            "seconds": [],
        }

    def step(self) -> float:
        """A step; its seconds until all processes have done it."""
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.accelerator.backward(self.model(**self.inputs).loss)
        self.optimizer.step()
        if dist.is_initialized():
            dist.barrier()
        return time.perf_counter() - start


def work(rank: int, size: int, arguments: Arguments, folder: str) -> None:
    """What one of `size` processes does; the first one writes what it has found."""
    torch.set_num_threads(1)
    logging.get_logger("hf_tying").setLevel(logging.ERROR)  # each tie is told otherwise
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{size}", rank=rank, world_size=size)
    rows = []
    for engine in AXES if size > 1 else ("one process",):
        runs = [Run(method, engine, arguments) for method in METHODS]
        for turn in range(arguments.rounds):
            for run in [*runs, *runs][turn % 3 : turn % 3 + 3]:
                run.found["seconds"].append(run.step())
        rows += [run.found for run in runs]
        del runs
    if rank == 0:
        Path(folder, f"{size}.json").write_text(json.dumps(rows), encoding="utf-8")


def measured(arguments: Arguments) -> list[dict]:
    """A row for each number of processes, engine and method, with its ratios to the untied model."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.processes:
            start_processes(work, (size, arguments, folder), nprocs=size, daemon=True, start_method="fork")
            rows += json.loads(Path(folder, f"{size}.json").read_text(encoding="utf-8"))
    untied = {(row["processes"], row["engine"]): row for row in rows if row["method"] == "untied"}
    for row in rows:
        base = untied[row["processes"], row["engine"]]
        ratios = [own / other for own, other in zip(row["seconds"], base["seconds"], strict=True)]
        row["ratios"] = {"time": statistics.median(ratios)}
        for name in ("counted_bytes", "optimizer_bytes", "peak_bytes"):
            row["ratios"][name] = row[name] / base[name] if base[name] else None
    return rows


def by_arithmetic() -> list[dict]:
    """A row for each model of a paper and number of GPUs, tied and untied."""
    rows = []
    for name, (architecture, config) in PAPERS.items():
        with torch.device("meta"):
            model = architecture(config)
        count = sum(p.numel() for p in model.parameters())
        for gpus in GPUS:
            ddp = parallel_plan(model, {"dp": gpus})
            fsdp = parallel_plan(model, {"fsdp": gpus}, gather_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
            untied = round(count * ddp.sent_untied / ddp.sent)  # under DDP bytes are as parameters
            rows.append({
                "model": name, "gpus": gpus, "parameters": {"tied": count, "untied": untied},
                "ddp_float32_sent": {"tied": ddp.sent, "untied": ddp.sent_untied},
                "fsdp2_bfloat16_sent": {"tied": fsdp.sent, "untied": fsdp.sent_untied},
                "ddp_adamw_bytes": {"tied": 8 * count, "untied": 8 * untied},
                "fsdp2_adamw_bytes": {"tied": 8 * count // gpus, "untied": 8 * untied // gpus},
            })  # fmt: skip
    return rows


def tables(rows: list[dict], papers: list[dict]) -> list[Table]:
    def mib(row: dict, name: str) -> str:
        ratio = row["ratios"].get(name)
        return f"{row[name] / 2**20:.2f}" + ("" if ratio is None else f" ({ratio:.2f})")

    first = Table(title="Measured, MiB and seconds; in brackets the ratio to the untied model", title_justify="left")
    for heading in ("processes", "engine", "method", "sent, counted", "planned", "AdamW", "peak", "step"):
        first.add_column(heading)
    for row in rows:
        seconds = f"{statistics.median(row['seconds']):.3f} ({row['ratios']['time']:.2f})"
        first.add_row(
            str(row["processes"]), row["engine"], row["method"], mib(row, "counted_bytes"), mib(row, "planned_bytes"),
            mib(row, "optimizer_bytes"), mib(row, "peak_bytes"), seconds,
        )  # fmt: skip
    second = Table(title="By arithmetic, GiB of one GPU, tied / untied (ratio)", title_justify="left")
    figures = ("ddp_float32_sent", "fsdp2_bfloat16_sent", "ddp_adamw_bytes", "fsdp2_adamw_bytes")
    for heading in ("model", "GPUs", *(name.replace("_", " ") for name in figures)):
        second.add_column(heading)
    for row in papers:
        cells = (row[name] for name in figures)
        second.add_row(
            row["model"], f"{row['gpus']:,}",
            *(f"{c['tied'] / 2**30:.3g} / {c['untied'] / 2**30:.3g} ({c['tied'] / c['untied']:.2f})" for c in cells),
        )  # fmt: skip
    return [first, second]


def main() -> None:
    """Do what the command line says."""
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    (arguments,) = parser.parse_args_into_dataclasses()
    if min(arguments.processes) < 1:
        sys.exit(f"error: --processes {min(arguments.processes)}: expected numbers from 1.")
    if arguments.quick:
        arguments.vocab_size, arguments.hidden_size, arguments.rounds, arguments.rows = 1000, 32, 1, 1
    logging.set_verbosity_error()
    report = {"machine": machine("cpu"), "rows": measured(arguments), "papers": by_arithmetic()}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(tables(report["rows"], report["papers"]), [f"Machine: {report['machine']}"])


if __name__ == "__main__":
    main()
