"""Measures of the package as a house: its lines, its functions, its names, its import arrows. Read with `ast`, never imported."""

import ast
import re
import statistics
from collections import Counter
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sae_italian"
FILES = sorted(PACKAGE.rglob("*.py"))
DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)


@cache
def text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(text(file))


def lines(file: Path) -> int:
    return len(text(file).splitlines())


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def statements() -> int:
    return sum(isinstance(node, ast.stmt) for file in FILES for node in ast.walk(tree(file)))


def docstring_lines(file: Path) -> set[int]:
    """Return the numbers of the lines that are docstrings, those of attributes too."""
    found: set[int] = set()
    for node in ast.walk(tree(file)):
        for part in node.body if isinstance(node, DOCUMENTED) else ():
            if (
                isinstance(part, ast.Expr)
                and isinstance(part.value, ast.Constant)
                and isinstance(part.value.value, str)
            ):
                found |= set(range(part.lineno, (part.end_lineno or part.lineno) + 1))
    return found


def air_and_widths() -> tuple[float, list[int]]:
    """Return the share of docstring and blank lines, and the lengths of the lines of code, sorted."""
    air, widths = 0, []
    for file in FILES:
        documented = docstring_lines(file)
        for number, line in enumerate(text(file).splitlines(), 1):
            if number in documented or not line.strip():
                air += 1
            elif not line.strip().startswith("#"):
                widths.append(len(line))
    return air / sum(map(lines, FILES)), sorted(widths)


def function_lengths() -> list[int]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    every = (node for file in FILES for node in ast.walk(tree(file)) if isinstance(node, functions))
    return sorted((node.end_lineno or 0) - node.lineno + 1 for node in every)


def percentile(values: list[int], share: float) -> float:
    return statistics.median(values) if share == 0.5 else values[int(share * len(values))]


def classes_named_twice() -> list[str]:
    every = (node.name for file in FILES for node in ast.walk(tree(file)) if isinstance(node, ast.ClassDef))
    return sorted(name for name, n in Counter(every).items() if n > 1 and not name.startswith("_"))


def module(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> set[str]:
    """Return the package's modules that a file imports, in functions too; for type checkers alone does not count."""
    known = {module(other) for other in FILES}
    for_types = {
        id(inner)
        for node in ast.walk(tree(file))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree(file)):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE.name:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE.name}
    return (found & known) - {module(file)}


def circles() -> list[list[str]]:
    """Return the groups of files that import one another in a circle; a folder's `__init__` only passes names on."""
    arrows = {module(file): imports(file) for file in FILES if file.name != "__init__.py"}
    reached: dict[str, set[str]] = {}
    for start in arrows:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for other in arrows.get(todo.pop(), set()) & arrows.keys():
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        reached[start] = seen
    return sorted({tuple(sorted(o for o in seen if m in reached[o])) for m, seen in reached.items() if m in seen})  # type: ignore[return-value]


def words_used() -> Counter[str]:
    """Count the words of all code, data and notebooks, without comments and docstrings."""
    counted: Counter[str] = Counter()
    for file in FILES:
        documented = docstring_lines(file)
        code = "\n".join(
            re.sub(r"(^|\s)# .*", "", line)
            for number, line in enumerate(text(file).splitlines(), 1)
            if number not in documented
        )
        counted.update(re.findall(r"\w+", code))
    shown = PACKAGE.parent.glob("notebooks/*.ipynb")
    for file in (*PACKAGE.rglob("*.yaml"), *PACKAGE.rglob("*.js"), *PACKAGE.rglob("*.html"), *shown):
        counted.update(re.findall(r"\w+", text(file)))
    return counted


def defined_names() -> list[tuple[Path, str]]:
    """Return every function, class and constant of a file's top level, and the methods of classes without a foreign base."""
    found: list[tuple[Path, str]] = []
    ours = {node.name for file in FILES for node in ast.walk(tree(file)) if isinstance(node, ast.ClassDef)}
    for file in FILES:
        for node in tree(file).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.append((file, node.name))
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found += [(file, target.id) for target in targets if isinstance(target, ast.Name)]
            if isinstance(node, ast.ClassDef) and all(isinstance(b, ast.Name) and b.id in ours for b in node.bases):
                found += [(file, part.name) for part in node.body if isinstance(part, ast.FunctionDef)]
    return [(file, name) for file, name in found if not (name.startswith("__") and name.endswith("__"))]


def unused_names() -> list[str]:
    """Return the names that the package itself never uses: only tests do, or nobody. Public names are for users."""
    counted, public = words_used(), set()
    for file in FILES:
        for node in tree(file).body:
            if isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
            ):
                public |= {part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)}
    defined = Counter(name for _, name in defined_names())
    return [
        f"{file.relative_to(PACKAGE)}: {name}"
        for file, name in defined_names()
        if name not in public and counted[name] <= defined[name]
    ]
