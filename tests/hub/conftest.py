"""A Hub on 127.0.0.1, and the variables of a process that takes it for huggingface.co."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER = Path(__file__).parents[1] / "loopback_hub.py"


class LoopbackHub:
    """The Hub of a module of tests.

    Args:
        address: where it serves.
        home: cache of the processes that use it.
    """

    def __init__(self, address: str, home: Path) -> None:
        self.address = address
        self.variables: dict[str, str | None] = {
            "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip

    def branches(self) -> dict[str, dict[str, str]]:
        """The commits of each repository, by the names of its branches."""
        with urllib.request.urlopen(f"{self.address}/test/state", timeout=10) as answer:
            return json.load(answer)

    def read(self, repository: str, path: str, revision: str = "main") -> bytes:
        """The content of a file."""
        with urllib.request.urlopen(f"{self.address}/{repository}/resolve/{revision}/{path}", timeout=10) as answer:
            return answer.read()

    def files(self, repository: str, revision: str = "main") -> list[str]:
        """The files of a repository, without the one that every repository has."""
        address = f"{self.address}/api/models/{repository}/revision/{revision}"
        with urllib.request.urlopen(address, timeout=10) as answer:
            found = [each["rfilename"] for each in json.load(answer)["siblings"]]
        return sorted(set(found) - {".gitattributes"})


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[LoopbackHub]:
    """One server for a module. It ends with its standard input, so it cannot outlive the tests."""
    server = subprocess.Popen(
        [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield LoopbackHub(server.stdout.readline().strip(), tmp_path_factory.mktemp("hf_home"))
    finally:
        server.stdin.close()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        server.stdout.close()
