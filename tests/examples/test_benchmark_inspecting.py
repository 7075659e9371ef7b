"""`examples/benchmarks/inspecting.py`: 100 shards of nearly 200 GB are inspected in 80 MiB."""

import json

from ..processes import ROOT, run_python


def test_a_large_checkpoint_is_inspected_in_little_memory(tmp_path):
    run_python(ROOT / "examples" / "benchmarks" / "inspecting.py", "--json", tmp_path / "numbers.json")
    numbers = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))
    assert numbers["exit_code"] == 0 and numbers["shards"] == 100 and numbers["bytes"] > 190e9
    assert numbers["peak_mib"] < 80
