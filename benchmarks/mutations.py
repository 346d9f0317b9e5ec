"""Which faults the tests would let through: small changes of the code, each of which some test should notice.

    make mutation                                   # the modules below, a sample of each
    make mutation MODULE="native overlap" SAMPLE=0  # all changes of two modules: hours

Writes ``benchmarks/mutations.md``. mutmut makes the changes and runs, for each, those tests of the module's files that
reach the changed function. It leaves decorated functions and constants of modules alone; texts of messages are left
out here, since tests match parts of them on purpose. A sample is drawn with a seed, and tried as far as the time goes.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import chdir, suppress
from dataclasses import dataclass, field
from pathlib import Path

from quality import table

ROOT = Path(__file__).parents[1]
TESTS = {
    "sentinel2/radiometry": ["catalog", "layouts", "safe"],
    "sentinel2/native": ["layouts", "scl"],
    "mapping/overlap": ["mapping"],
    "growing": ["growing", "overviews", "object_stores"],
    "store": ["store", "growing"],
    "transactions": ["growing", "object_stores"],
}
"""The modules whose faults cost most, and the files of tests that hold each."""
LEFT_OUT = ["layouts.py::test_an_offset_taken_twice_is_told_whatever_was_computed_of_the_dates"]
"""Tests that fail where a function is one that calls another, as mutmut makes them."""
KILLED = ("killed", "timeout", "segfault")
CONFIG = """
[tool.mutmut]
source_paths = ["xr_ginet"]
only_mutate = ["xr_ginet/{module}.py"]
also_copy = ["benchmarks", "examples", "README.md"]
pytest_add_cli_args = ["-m", "not slow", "-p", "no:cacheprovider", "--no-header"{left_out}]
pytest_add_cli_args_test_selection = [{tests}]
process_isolation = "forkserver"  # torch does not survive a fork once it has worked
timeout_multiplier = 5.0
timeout_constant = 20.0
use_git_change_detection = false
debug = true  # else it hides what pytest says when it cannot start
"""


@dataclass
class Found:
    """What became of a module's changes."""

    module: str
    changes: int
    sample: int
    states: Counter[str] = field(default_factory=Counter)
    survivors: list[tuple[int, str, str]] = field(default_factory=list)
    """Line, and its text before and after."""

    @property
    def killed(self) -> int:
        return sum(self.states[state] for state in KILLED)

    @property
    def tried(self) -> int:
        return self.sample - self.states["not checked"]

    def row(self) -> list[str]:
        share = f"{self.killed / self.tried:.0%}" if self.tried else "-"
        return [f"`{self.module}`", f"{self.changes}", f"{self.tried}", f"{self.killed}", share]


def copy_of_tree(module: str, folder: Path) -> Path:
    """Copy what git knows of into a folder, with mutmut's configuration; the real scenes are linked beside."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "mutants").mkdir(parents=True)  # a path that is not there when Python starts is never looked at again
    known = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in known.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    tests = ", ".join(f'"tests/test_{name}.py"' for name in TESTS[module])
    with (folder / "pyproject.toml").open("a") as file:
        left_out = "".join(f', "--deselect=tests/test_{name}"' for name in LEFT_OUT)
        file.write(CONFIG.format(module=module, tests=tests, left_out=left_out))
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to((ROOT.parent / "shared").resolve())  # beside mutants/
    return folder


class _WithoutMessages(ast.NodeTransformer):
    """Leaves out what errors, warnings and logs say."""

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return ast.Raise(kind, node.cause)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        told = re.match(r"(warnings|logg\w*|log)\.(warn|debug|info|warning|error|exception)$", ast.unparse(node.func))
        return ast.Call(node.func, [], []) if told else self.generic_visit(node)


def changes_of(module: str, root: Path) -> dict[str, tuple[str, str]]:
    """Return mutmut's changes of a module that are not of messages alone: the function's text before and after."""
    from mutmut.mutation.file_mutation import mutate_file_contents
    from mutmut.utils.format_utils import get_mutant_name

    path = Path("xr_ginet") / f"{module}.py"
    with chdir(root):  # where its configuration is
        made = mutate_file_contents(str(path), path.read_text())
    functions = {node.name: node for node in ast.walk(ast.parse(made.code)) if isinstance(node, ast.FunctionDef)}
    changes = {}
    for name in made.mutant_names:
        before, after = functions[name.partition("__mutmut_")[0] + "__mutmut_orig"], functions[name]
        after.name = before.name
        texts = ast.unparse(before), ast.unparse(after)
        plain = [ast.dump(_WithoutMessages().visit(ast.parse(text))) for text in texts]
        if plain[0] != plain[1]:
            changes[get_mutant_name(path, name)] = texts
    return changes


def place(module: str, name: str, before: str, after: str) -> tuple[int, str, str]:
    """Return the line in a module that was changed, about, and its text before and after."""
    old, new = before.splitlines(), after.splitlines()
    at = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    function = re.split(r"[ǁ_]", name.partition("__mutmut_")[0].rpartition(".x")[2], maxsplit=1)[1]
    function = function.rpartition("ǁ")[2]
    path = ROOT / "xr_ginet" / f"{module}.py"
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name == function]
    # The text was written anew, a statement a line: its statements are those of the module's function.
    written = ast.parse(before).body[0]
    lines = [
        real.lineno
        for node in nodes
        for mine, real in zip(_statements(written), _statements(node), strict=False)
        if mine.lineno <= at + 1
    ]
    return max(lines, default=0), old[at].strip(), new[at].strip()


def _statements(function: ast.AST) -> Iterator[ast.stmt]:
    return (node for node in ast.walk(function) if isinstance(node, ast.stmt))


def mutate(module: str, folder: Path, sample: int, seed: int, minutes: float) -> Found:
    """Try a sample of a module's changes for some minutes."""
    copy_of_tree(module, folder)
    changes = changes_of(module, folder)
    names = sorted(changes)
    random.Random(seed).shuffle(names)
    names = names[: sample or None]
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "2", *names]
    environment = os.environ | {"PYTHONPATH": str(folder / "mutants")}  # for processes that tests start
    with (folder / "mutmut.log").open("w") as log, suppress(subprocess.TimeoutExpired):
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, timeout=60 * minutes)
    told = json.loads((folder / "mutants" / "xr_ginet" / f"{module}.py.meta").read_text())["exit_code_by_key"]
    return judged(module, changes, {name: told.get(name) for name in names})


def judged(module: str, changes: dict[str, tuple[str, str]], told: dict[str, int | None]) -> Found:
    """Return what exit statuses of the tests say of changes."""
    from mutmut.stats import status_by_exit_code

    found = Found(module, len(changes), len(told))
    for name, status in told.items():
        state = status_by_exit_code[status]
        found.states[state] += 1
        if state not in (*KILLED, "not checked"):
            found.survivors.append(place(module, name, *changes[name]))
    found.survivors.sort()
    return found


def page(found: Iterable[Found], seed: int) -> str:
    """Return the page."""
    found = list(found)
    parts = [
        "# Mutations",
        "`make mutation`: small changes of the code, and whether a test noticed. mutmut makes them; decorated "
        "functions, constants of modules and texts of messages are left out. Tried: a sample drawn with the seed "
        f"{seed}. A change counts as noticed too when it makes the tests hang.",
        table(["module", "changes", "tried", "noticed", "share"], [one.row() for one in found]),
    ]
    for one in found:
        if one.survivors:
            rows = [[f"{line}", f"`{before}`", f"`{after}`"] for line, before, after in one.survivors]
            rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
            parts += [f"## `{one.module}`: not noticed", table(["line", "is", "was made"], rows)]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="such as store or native; all of the above by default")
    parser.add_argument("--sample", type=int, default=60, help="changes of each module; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="for each module")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutations")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("mutations.md"))
    options = parser.parse_args(arguments)
    modules = [m for m in TESTS if not options.modules or m in options.modules or m.split("/")[-1] in options.modules]
    found = []
    for module in modules:
        folder = options.folder / module.replace("/", "-")
        found.append(mutate(module, folder, options.sample, options.seed, options.minutes))
        print(*found[-1].row(), flush=True)
    options.out.write_text(page(found, options.seed))
    print(options.out.read_text())


if __name__ == "__main__":
    main()
