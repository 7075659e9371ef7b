"""Rewrite what a user's module imports from this package to files beside it; parsed, never matched as text.

Names are imported one a line, at the start of the line, because transformers finds the files to copy by such lines.
A use through the package (`hf_tying.TiedModelMixin`) becomes a use of the imported name.
"""

import ast
from collections.abc import Callable

from ..config import TyingError

_PACKAGE = "hf_tying"
#: `(module, name)` to the file beside, without `.py`. `None`: it cannot be carried.
Place = Callable[[str, str], str | None]


def imports_package(text: str, file: str) -> bool:
    """Whether a module imports this package, in any form.

    Args:
        text: source of the module.
        file: its name, for the error of a source that cannot be parsed.
    """
    return any(_imports_package(node) for node in ast.walk(_parse(text, file)))


def rewrite_imports(text: str, file: str, place: Place) -> str:
    """The source with each import of this package turned into imports from files beside it.

    Args:
        text: source of the module.
        file: its name, for errors.
        place: file beside the module that defines a name of this package.

    Raises:
        TyingError: an import that cannot be rewritten: of `*`, by a string, on a line with another statement, of a
            module used as a value, or of a name that cannot be carried.
    """
    return _Rewriting(text, file, place).result()


class _Rewriting:
    def __init__(self, text: str, file: str, place: Place) -> None:
        self.file, self.place = file, place
        self.tree = _parse(text, file)
        self.lines = [line.encode() for line in text.splitlines(keepends=True)]
        self.modules: dict[str, str] = {}  # a name in the source, and the module of this package that it is
        self.edits: list[tuple[ast.stmt | ast.expr, str]] = []
        self.used: dict[str, str] = {}  # an import line for each use through a module

    def result(self) -> str:
        statements = [node for node in ast.walk(self.tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        statements = [node for node in statements if _imports_package(node)]
        kept = [(node, self._names(node)) for node in statements]
        self._replace_uses(self.tree)
        self._refuse_strings()
        for node, lines in kept:
            if any(alias for alias in node.names if self._bound(node, alias) in self.modules):
                lines = [*lines, *self.used.values()]
            start, after = self.lines[node.lineno - 1][: node.col_offset], self.lines[node.end_lineno - 1]
            if start.strip() or after[node.end_col_offset :].strip()[:1] not in (b"", b"#"):
                raise self._refused(node, "shares its line with another statement: put it on a line of its own")
            self.edits.append((node, f"\n{start.decode()}".join(lines or ["pass"])))
        for node, new in sorted(self.edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
            first, last = node.lineno - 1, node.end_lineno - 1
            head, tail = self.lines[first][: node.col_offset], self.lines[last][node.end_col_offset :]
            self.lines[first : last + 1] = [head + new.encode() + tail]
        return b"".join(self.lines).decode()

    def _names(self, node: ast.Import | ast.ImportFrom) -> list[str]:
        """The lines that replace an import; modules that it binds are noted."""
        lines = []
        module = "" if isinstance(node, ast.Import) else node.module or ""
        for alias in node.names:
            whole = f" as {alias.asname}" if alias.asname else ""
            if isinstance(node, ast.Import):
                if alias.name.partition(".")[0] != _PACKAGE:
                    lines.append(f"import {alias.name}{whole}")
                else:
                    self.modules[self._bound(node, alias)] = alias.name if alias.asname else _PACKAGE
                continue
            if alias.name == "*":
                raise self._refused(node, "imports everything: import the names that the file uses")
            found = self.place(module, alias.name)
            if found is not None:
                lines.append(f"from .{found} import {alias.name}{whole}")
            elif _is_module(f"{module}.{alias.name}"):
                self.modules[self._bound(node, alias)] = f"{module}.{alias.name}"
            else:
                raise self._refused(node, f"imports {alias.name!r}, which cannot be carried along")
        return lines

    def _replace_uses(self, node: ast.AST) -> None:
        """Note an edit for each use of a name through a module, in the whole tree."""
        if isinstance(node, ast.Attribute) and (chain := _chain(node)) and chain[0] in self.modules:
            module, *path = self.modules[chain[0]], *chain[1:]
            while len(path) > 1 and _is_module(f"{module}.{path[0]}"):
                module = f"{module}.{path.pop(0)}"
            found = self.place(module, path[0])
            if found is None:
                raise self._refused(node, f"uses {module}.{path[0]}, which cannot be carried along")
            name = f"_{found}_{path[0]}"
            self.used[name] = f"from .{found} import {path[0]} as {name}"
            self.edits.append((node, ".".join([name, *path[1:]])))
            return
        bound = {ast.Name: "id", ast.arg: "arg", ast.FunctionDef: "name", ast.ClassDef: "name"}.get(type(node))
        if bound and getattr(node, bound) in self.modules:
            raise self._refused(node, f"uses {getattr(node, bound)!r} as a value, or gives the name to something else")
        for child in ast.iter_child_nodes(node):
            self._replace_uses(child)

    def _refuse_strings(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and _imports_by_string(node):
                raise self._refused(node, "imports by a string: write an import statement")

    def _bound(self, node: ast.Import | ast.ImportFrom, alias: ast.alias) -> str:
        name = alias.name.partition(".")[0] if isinstance(node, ast.Import) else alias.name
        return alias.asname or name

    def _refused(self, node: ast.AST, why: str) -> TyingError:
        return TyingError(
            f"Cannot save the code of {self.file}: line {getattr(node, 'lineno', '?')} {why}. Expected imports that "
            "work where hf_tying is not installed, such as `from hf_tying import TiedModelMixin`."
        )


def _parse(text: str, file: str) -> ast.Module:
    try:
        return ast.parse(text, file)
    except SyntaxError as error:
        raise TyingError(f"Cannot save the code of {file}: it cannot be parsed ({error}).") from error


def _imports_package(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.partition(".")[0] == _PACKAGE for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return not node.level and (node.module or "").partition(".")[0] == _PACKAGE
    return isinstance(node, ast.Call) and _imports_by_string(node)


def _imports_by_string(node: ast.Call) -> bool:
    called = getattr(node.func, "attr", getattr(node.func, "id", None))
    first = node.args[0] if node.args else None
    return (
        called in ("import_module", "__import__")
        and isinstance(first, ast.Constant)
        and str(first.value).partition(".")[0] == _PACKAGE
    )


def _chain(node: ast.expr) -> list[str] | None:
    """`a.b.c` as `["a", "b", "c"]`; `None` for an attribute of anything else than a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else None


def _is_module(name: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
