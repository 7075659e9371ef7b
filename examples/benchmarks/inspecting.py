"""What `hf-tying inspect` takes of a large checkpoint: CPU and memory, for 100 shards of nearly 200 GB.

    python examples/benchmarks/inspecting.py
    python examples/benchmarks/inspecting.py --json inspecting.json

The shards are real safetensors files, with headers of a Llama of 97 billion parameters and holes for weights, which
take no room on the disk. The bounds are one second of CPU and 80 MiB. Linux and macOS alone, for `os.wait4`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path

WIDTH, INNER, VOCABULARY = 8192, 28672, 128256


def make_sparse(folder: Path, shards: int) -> int:
    """Write a Llama without its weights; return the bytes that they would have."""
    squares = {f"self_attn.{kind}_proj": [WIDTH, WIDTH] for kind in "qkvo"}
    matrices = squares | {
        "mlp.gate_proj": [INNER, WIDTH],
        "mlp.up_proj": [INNER, WIDTH],
        "mlp.down_proj": [WIDTH, INNER],
    }
    layer = matrices | dict.fromkeys(("input_layernorm", "post_attention_layernorm"), [WIDTH])
    parts = [{"model.embed_tokens.weight": [VOCABULARY, WIDTH], "model.norm.weight": [WIDTH]}]
    parts += [{f"model.layers.{i}.{n}.weight": shape for n, shape in layer.items()} for i in range(shards - 1)]
    weight_map, total = {}, 0
    for i, part in enumerate(parts):
        file, header, end = f"model-{i + 1:05}-of-{shards:05}.safetensors", {}, 0
        for name, shape in part.items():
            offsets = [end, end := end + 2 * prod(shape)]
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(part, file)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "vocab_size": VOCABULARY,
        "intermediate_size": INNER, "num_hidden_layers": shards - 1, "num_attention_heads": 64,
        "num_key_value_heads": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return total


def measure(*arguments: str | Path) -> dict[str, float]:
    """The exit code, CPU seconds and peak MiB of a command of `hf-tying`.

    The peak of a new process is at least what this one holds, so that nothing large may be imported here.
    """
    process = subprocess.Popen([sys.executable, "-m", "hf_tying", *arguments], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return {
        "exit_code": os.waitstatus_to_exitcode(status),
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / unit,
    }


def main() -> None:
    """Measure, print and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100, help="One layer in each but the first: the embedding.")
    parser.add_argument("--json", type=Path, help="Write all numbers to this file.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = make_sparse(Path(folder), args.shards)
        numbers = {"shards": args.shards, "bytes": size} | measure("inspect", folder)
    used = f"{numbers['cpu_seconds']:.2f} s of CPU, {numbers['peak_mib']:.0f} MiB"
    print(f"{args.shards} shards, {size / 1e9:.0f} GB: {used}, exit code {numbers['exit_code']}")
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
