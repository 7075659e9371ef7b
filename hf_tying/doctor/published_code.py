"""Diseases of the code that a checkpoint carries. It is parsed, and never run."""

import ast
import sys
from collections.abc import Iterator

from ..report.records import Finding
from ..report.sources import Source
from .facts import Facts, ModelFacts

_LARGEST = 2**20
_MOST_FILES = 100


def published_code(facts: Facts, model: ModelFacts) -> Iterator[Finding]:
    """T018: code that does not compile or import without hf_tying. T019: ties in the form of transformers 4."""
    if not model.config.get("auto_map"):
        return
    source = facts.source
    files = [name for name in source.files() if name.endswith(".py") and "/" not in name][:_MOST_FILES]
    for name in files:
        text = _text(source, name)
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = getattr(error, "lineno", None)
            yield Finding(
                "T018",
                "error",
                f"{name} is no Python that this interpreter ({sys.version_info[0]}.{sys.version_info[1]}) can compile"
                + (f": line {line}" if line else "")
                + ". Nobody can load the model with its own code.",
                "Save the model again with register_for_auto_class.",
            )
            continue
        yield from _imports(source, name, tree)
        yield from _lists(name, tree)


def _imports(source: Source, name: str, tree: ast.Module) -> Iterator[Finding]:
    for node in _at_import(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif node.level == 0:
            modules = [node.module or ""]
        else:
            missing = [m for m in _siblings(node) if not source.has(f"{m}.py")]
            if node.module and missing:
                yield Finding(
                    "T018",
                    "error",
                    f"{name}, line {node.lineno}, imports .{missing[0]:.80}, and there is no {missing[0]:.80}.py: the "
                    "model cannot be loaded with its own code.",
                    "Save the model again with register_for_auto_class.",
                )
            continue
        if any(module.split(".")[0] == "hf_tying" for module in modules):
            yield Finding(
                "T018",
                "error",
                f"{name}, line {node.lineno}, imports hf_tying: whoever does not have it cannot load the model.",
                "Save the model again: register_for_auto_class and save_pretrained carry the code along.",
            )


def _at_import(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when the file is imported, but for those inside `try` and for type checkers."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If):
            checked = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            waiting += node.orelse if checked else [*node.body, *node.orelse]
        elif isinstance(node, ast.ClassDef | ast.With):
            waiting += node.body


def _siblings(node: ast.ImportFrom) -> list[str]:
    return [(node.module or "").split(".")[0]]


def _lists(name: str, tree: ast.Module) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        named = any(isinstance(t, ast.Name) and t.id == "_tied_weights_keys" for t in targets)
        if named and isinstance(node.value, ast.List | ast.Tuple):
            yield Finding(
                "T019",
                "warning",
                f"{name}, line {node.lineno}: _tied_weights_keys is a list, the form of transformers 4. transformers "
                "5 does not tie by it: names that the file lacks stay random, or the class is refused.",
                "Write it as a dict from each tied name to its source: "
                '{"lm_head.weight": "model.embed_tokens.weight"}.',
            )


def _text(source: Source, name: str) -> str:
    return source.read(name, 0, min(source.size(name), _LARGEST)).decode("utf-8", "replace")
