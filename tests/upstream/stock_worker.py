"""A process without this package, which loads folders as others do: `python -m tests.upstream.stock_worker`.

It reads one JSON object a line, `{"folder", "classes", "out"}`, and answers each by one: the facts of `lives.changed`,
with the values in the file `out`; or `{"error"}`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


class StockWorker:
    """The process, from outside. It is started by the first question.

    Example:
        >>> with StockWorker() as worker:
        ...     worker.ask(folder, ["LlamaForSequenceClassification", "LlamaForCausalLM"])
    """

    def __init__(self):
        self.process = None
        self.scratch = tempfile.TemporaryDirectory()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self.process:
            self.process.kill()
            self.process.wait()
        self.scratch.cleanup()

    def ask(self, folder: Path, classes: list[str]) -> dict:
        """The facts of `lives.changed(folder, classes)` in a process that has never heard of this package.

        Raises:
            RuntimeError: what went wrong there.
        """
        if self.process is None:
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            environment = os.environ | {"TRANSFORMERS_VERBOSITY": "critical", "PYTHONPATH": path}
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", __name__],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        out = Path(self.scratch.name) / "values.pt"
        question = {"folder": str(folder), "classes": classes, "out": str(out)}
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer | {"values": torch.load(out)}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    from .lives import changed, line

    for asked in sys.stdin:
        question = json.loads(asked)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                facts = changed(Path(question["folder"]), question["classes"], Path(scratch))
            torch.save(facts.pop("values"), question["out"])
        except Exception as error:
            facts = {"error": line(error)}
        assert "hf_tying" not in sys.modules
        print(json.dumps(facts), file=answers, flush=True)


if __name__ == "__main__":
    main()
