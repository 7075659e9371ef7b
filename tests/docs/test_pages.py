"""What README.md and docs/ say of the package is so: links, versions, extras, names, flows, changes, numbers."""

import importlib
import importlib.util
import inspect
import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from hf_tying.hook import CHANGES, TESTED

from ..processes import run_python
from ..test_public_names import PUBLIC
from .blocks import PAGES, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def setup() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The places in a page that a link may name, as GitHub and mkdocs call them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower())) for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(path):
    for place in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if place.startswith("http"):
            continue
        file, _, heading = place.partition("#")
        target = (path.parent / file) if file else path
        assert target.exists(), place
        assert not heading or heading in anchors(target), place


def test_the_readme_is_short_and_has_nothing_left_to_fill_in():
    assert len(README.splitlines()) <= 160
    for path in PAGES:
        assert not re.search(r"\b(TODO|FIXME|XXX|TBD)\b|_OUTPUT\b", path.read_text(encoding="utf-8")), path


def test_no_page_is_left_out_of_the_site():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"^ *- [^#\n]*: ([\w/]+\.md)$", text, re.MULTILINE))
    assert named == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_the_versions_are_those_of_the_metadata(setup):
    [least] = re.findall(r"transformers>=([\d.]+)", setup["options"]["install_requires"])
    newest = TESTED[1].rpartition(".")[0]
    assert f"transformers {least} or newer ([tested to {newest}]" in README
    assert f"transformers {TESTED[0]} to {TESTED[1]}" in page("faq.md")
    oldest_torch = re.search(r"torch>=([\d.]+)", setup["options"]["install_requires"])[1]
    assert f"torch {oldest_torch} or newer" in README


def test_the_citation_has_the_version_and_the_licence_of_the_metadata(setup):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == setup["metadata"]["version"]
    assert citation["license"] == setup["metadata"]["license_expression"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_the_python_versions_are_said_alike_everywhere(setup):
    pythons = re.findall(r"Python :: (3\.\d+)$", setup["metadata"]["classifiers"], re.MULTILINE)
    assert pythons == ["3.11", "3.12", "3.13"]
    assert f"Python {pythons[0]} to {pythons[-1]}" in README
    assert f"Python {pythons[0]} to {pythons[-1]}" in page("quickstart.md")
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python-version"] == pythons


def test_the_workflow_and_the_hooks_call_targets_of_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    called = [*steps, *(hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"])]
    assert len(called) == 4
    assert {command.removeprefix("make ") for command in called} <= targets


def test_every_extra_is_listed(setup):
    extras = set(setup["options.extras_require"])
    install = next(line for line in README.splitlines() if "pip install '.[plots]'" in line)
    quickstart = page("quickstart.md").partition("## 11.")[2]
    for extra in extras:
        assert re.search(rf"\b{extra}\b", install), extra
        assert re.search(rf"\|.*`{extra}`.*\|", quickstart), extra


def test_the_quickstart_has_its_twelve_tasks():
    assert re.findall(r"^## (\d+)\.", page("quickstart.md"), re.MULTILINE) == [str(i) for i in range(1, 13)]


def test_every_flow_is_in_the_table_and_cited_by_the_test_that_it_names():
    rows = re.findall(r"^\| (f\d\d) \|(.*)\|$", page("concepts/flows.md"), re.MULTILINE)
    assert [number for number, _ in rows] == [f"f{i:02}" for i in range(1, 26)]
    for number, row in rows:
        tests = [ROOT / "tests" / cell.strip().strip("`") for cell in row.split("|")[-2:]]
        texts = [test.read_text(encoding="utf-8") for test in tests]
        for test, text in zip(tests, texts, strict=True):
            assert re.search(rf"\b{number}b?\b", spans(text)), (number, test)
        assert re.search(r"shared.layers|\bkind\b", texts[1]) and "relax" in texts[1].lower(), (number, tests[1])


def spans(text: str) -> str:
    """`f01 to f05` names all five."""
    return re.sub(
        r"\bf(\d\d) to f(\d\d)\b",
        lambda span: ", ".join(f"f{i:02}" for i in range(int(span[1]), int(span[2]) + 1)),
        text,
    )


def test_the_silent_flows_are_counted_right():
    stock = [row.split("|")[3] for row in page("concepts/flows.md").splitlines() if re.match(r"\| f\d\d \|", row)]
    assert sum("**silent**" in cell for cell in stock) == 13
    assert "silent in 13 of 25 flows" in README and "Of the 25, 13 are silent" in page("concepts/flows.md")


def test_every_change_is_on_the_page_of_changes_and_no_other():
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|", page("concepts/patched.md"), re.MULTILINE)
    assert sorted(rows) == sorted((change.module, change.name) for change in CHANGES)


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module):
    pages = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "reference").glob("*.md")))
    listed = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    found = importlib.import_module(module)
    for name in found.__all__:
        value = getattr(found, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert f"{value.__module__}.{value.__qualname__}" in listed, name


@pytest.mark.parametrize(
    "number", ["134.56", "144.14", "98.28", "98.44", "0.74", "0.36", "2.11", "2.13", "115.4", "112.4"]
)
def test_a_number_of_the_readme_is_that_of_the_benchmarks(number):
    rounded = f"{float(number):.1f}" if number in ("134.56", "144.14", "98.28", "98.44") else number
    assert rounded in README and number in page("benchmarks.md")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="pip install hf-tying[docs]")
def test_the_site_is_built_without_a_warning(tmp_path):
    done = run_python(
        *("-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"),
        cwd=ROOT,
        environment={"NO_MKDOCS_2_WARNING": "1"},
    )
    assert "WARNING" not in done.stdout + done.stderr
    text = (tmp_path / "site" / "reference" / "ties" / "index.html").read_text(encoding="utf-8")
    assert "init_from" in text and "TyingError" in text
