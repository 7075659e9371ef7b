"""How much memory `hf-tying tie`, `untie` and `convert` take, as a ratio to the largest shard.

    python examples/benchmarks/rewriting.py --quick                # shards of 10 MB, to see it run
    python examples/benchmarks/rewriting.py --json rewriting.json

A Llama of random numbers is saved in eight shards of about 100 MB, and rewritten by each command in a process of its
own. Counted is the peak of its resident memory, mapped files included, over what it held before; it has rewritten a
small model by then, so that what is imported does not count. Linux alone: the peak is read from /proc/self.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_tying.training.command_line import HelpFormatter

#: What is measured: the command, whether its source is tied, and the arguments of `rewrite`.
COMMANDS = {
    "tie": (False, {"to": "two_way", "init_from": "target"}),
    "untie": (True, {"to": "none"}),
    "convert --to portable": (True, {"to": "portable"}),
    "convert --to dedup": (True, {"to": "dedup"}),
}


@dataclass
class Arguments:
    quick: bool = field(default=False, metadata={"help": "Shards of 10 MB."})
    json: str | None = field(default=None, metadata={"help": "Write all numbers to this file."})


@dataclass
class Row:
    """One command's figures, in bytes."""

    command: str
    shards: int
    largest: int
    written: int
    peak: int

    @property
    def ratio(self) -> float:
        """The peak in shards."""
        return self.peak / self.largest


def make_model(folder: Path, tied: bool, width: int, shard: str) -> None:
    """Save a Llama whose matrices are a shard each, and whose layers are two to a shard."""
    config = LlamaConfig(
        vocab_size=24 * width, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard)


def peak_of(source: Path, small: Path, out: Path, options: dict[str, str]) -> int:
    """The peak of a process that rewrites `source`, in bytes over what it held before."""
    command = [sys.executable, __file__, "--measure", json.dumps([str(source), str(small), str(out), options])]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure(source: str, small: str, out: str, options: dict[str, str]) -> None:
    """In a process of its own: rewrite `small`, then `source`, and print the peak of the second."""
    from hf_tying.doctor import rewrite

    logging.disable_progress_bar()
    rewrite(small, f"{out}-small", **options)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    rewrite(source, out, **options)
    print(_status("VmHWM") - before)


def _status(name: str) -> int:
    """A size of this process, in bytes."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def run(width: int, shard: str) -> list[Row]:
    """Measure every command."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for tied in (False, True):
            source, small = root / f"source-{tied}", root / f"small-{tied}"
            make_model(source, tied, width, shard)
            make_model(small, tied, 16, "4KB")
            files = [file.stat().st_size for file in source.glob("*.safetensors")]
            for command, (wants_tied, options) in COMMANDS.items():
                if wants_tied is tied:
                    out = root / f"out-{len(rows)}"
                    peak = peak_of(source, small, out, options)
                    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
                    rows.append(Row(command, len(files), max(files), written, peak))
    return rows


def main() -> None:
    """Measure, print the table, write the numbers."""
    if sys.argv[1:2] == ["--measure"]:
        measure(*json.loads(sys.argv[2]))
        return
    (args,) = HfArgumentParser(
        Arguments, description=__doc__, formatter_class=HelpFormatter
    ).parse_args_into_dataclasses()
    logging.disable_progress_bar()
    rows = run(*((320, "10MB") if args.quick else (1024, "100MB")))
    table = Table("command", "shards", "largest", "written", "peak", "peak in shards")
    for row in rows:
        sizes = (f"{size / 1e6:.1f} MB" for size in (row.largest, row.written, row.peak))
        table.add_row(row.command, str(row.shards), *sizes, f"{row.ratio:.2f}")
    Console().print(table)
    if args.json:
        numbers = [asdict(row) | {"ratio": row.ratio} for row in rows]
        Path(args.json).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
