"""The runner itself, without its download: what counts as a failure, and what it says when it cannot run."""

import io
import json
import tarfile

import pytest

from .report import Session, findings
from .sdist import SdistError, _unpack_tests, fetch_tests


def session(tmp_path, name, collected=None, **outcomes):
    """A session file with one result for each `test=outcome` of family Llama, read back."""
    path = tmp_path / name
    header = {"collected": len(outcomes) if collected is None else collected, "deselected": {}}
    results = [{"family": "Llama", "test": t, "outcome": o, "reason": f"why {o}"} for t, o in outcomes.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *results]))
    return Session(path).read()


def test_a_failure_that_the_stock_class_has_too_is_shown_and_does_not_count(tmp_path):
    tied = session(tmp_path, "tied", test_a="failed", test_b="failed", test_c="passed")
    stock = session(tmp_path, "stock", test_a="failed", test_b="passed", test_c="passed")
    assert [(f.test, f.counts) for f in findings(tied, stock)] == [("test_a", False), ("test_b", True)]


def test_a_test_that_only_the_tied_class_skips_counts_as_a_failure(tmp_path):
    tied = session(tmp_path, "tied", test_a="skipped", test_b="skipped")
    stock = session(tmp_path, "stock", test_a="passed", test_b="skipped")
    assert [(f.test, f.reason, f.counts) for f in findings(tied, stock)] == [("test_a", "skipped: why skipped", True)]


def test_a_failure_of_a_test_that_the_control_does_not_have_counts(tmp_path):
    tied, stock = session(tmp_path, "tied", test_own="failed"), session(tmp_path, "stock", test_a="passed")
    assert [(f.test, f.counts) for f in findings(tied, stock)] == [("test_own", True)]


def test_with_the_stock_classes_alone_each_failure_counts(tmp_path):
    assert [f.counts for f in findings(None, session(tmp_path, "stock", test_a="failed"))] == [True]


def test_a_session_that_died_on_the_way_is_not_complete(tmp_path):
    assert session(tmp_path, "whole", test_a="passed").complete
    assert not session(tmp_path, "half", collected=2, test_a="passed").complete
    assert not Session(tmp_path / "absent").read().complete


def archive(path, *names):
    with tarfile.open(path, "w:gz") as files:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 4
            files.addfile(member, io.BytesIO(b"pass"))
    return path


def test_only_the_top_level_test_files_are_unpacked(tmp_path):
    names = ["t-1/tests/test_modeling_common.py", "t-1/tests/deep/test_x.py", "t-1/src/a.py", "t-1/tests/a.txt"]
    _unpack_tests(archive(tmp_path / "t.tar.gz", *names), tmp_path / "tests")
    assert [path.name for path in (tmp_path / "tests").iterdir()] == ["test_modeling_common.py"]


def test_an_sdist_without_the_common_tests_is_refused(tmp_path):
    with pytest.raises(SdistError, match="holds no tests/test_modeling_common.py.*Way out"):
        _unpack_tests(archive(tmp_path / "t.tar.gz", "t-1/src/a.py"), tmp_path / "tests")


def test_without_an_index_the_error_says_the_way_out_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SdistError, match="could not download(.|\n)*Way out"):
        fetch_tests("5.0.0", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
