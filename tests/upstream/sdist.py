"""Fetch the tests of an installed package: they are in its source distribution, not in its wheel."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

# By package, the file that the others build on.
COMMON_TESTS = {"transformers": "test_modeling_common.py", "peft": "testing_common.py"}


class SdistError(RuntimeError):
    """The tests of an installed package could not be had."""


def fetch_tests(version: str, cache: Path, package: str = "transformers") -> Path:
    """Return the folder with the test files of one version of a package, downloading them once.

    Args:
        version: release of the package, as on the package index, such as `"5.23.0"`.
        cache: folder that keeps the unpacked files between runs.
        package: `"transformers"` or `"peft"`.

    Returns:
        `cache/<package>-<version>/tests`, holding the common tests and their siblings.

    Raises:
        SdistError: pip found no such source distribution, or it does not hold the common tests.
    """
    tests = cache / f"{package}-{version}" / "tests"
    if tests.is_dir():
        return tests
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        _unpack_tests(_download(version, Path(scratch), package), Path(scratch) / "tests", COMMON_TESTS[package])
        tests.parent.mkdir(exist_ok=True)
        # In one step, so that an interrupted run leaves no half-filled folder to be taken for a whole one.
        os.replace(Path(scratch) / "tests", tests)
    return tests


def _download(version: str, folder: Path, package: str) -> Path:
    # pip asks every source distribution for its metadata; nothing is built or installed.
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", package, "--dest", str(folder), f"{package}=={version}"]
    answer = subprocess.run(command, capture_output=True, text=True)
    archives = list(folder.glob(f"{package}-*.tar.gz"))
    if answer.returncode or not archives:
        raise SdistError(
            f"pip could not download the source distribution of {package} {version}, which holds its tests:\n"
            f"{(answer.stderr or answer.stdout).strip()[-800:]}\n"
            f"Expected: a release on the package index and a network. Way out: install a released {package}, or "
            f"put the tests/*.py of that version into {folder.parent / f'{package}-{version}' / 'tests'}."
        )
    return archives[0]


def _unpack_tests(archive: Path, folder: Path, common: str = COMMON_TESTS["transformers"]) -> None:
    folder.mkdir()
    with tarfile.open(archive) as files:
        for member in files:
            parts = Path(member.name).parts
            if member.isfile() and parts[1:2] == ("tests",) and len(parts) == 3 and member.name.endswith(".py"):
                with (folder / parts[2]).open("wb") as target:
                    shutil.copyfileobj(files.extractfile(member), target)
    if not (folder / common).exists():
        raise SdistError(
            f"{archive.name} holds no tests/{common}; expected the common tests there, found "
            f"{len(list(folder.iterdir()))} other test files. Way out: run with a release that ships them, such as "
            "transformers 5.23.0 and peft 0.21.2."
        )
