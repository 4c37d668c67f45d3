"""How many small faults the suite finds: `python tests/mutants.py --count 60 --seed 0`.

Each mutant changes one operator or constant on one line of a pillar. It is killed when a test fails (or never ends).
With `--contexts FILE`, the data of `pytest --cov=hf_effdl --cov-context=test` (pytest-cov), only the tests that run
the changed line are asked first; survivors are then given to the whole suite with `--whole`. Results go to `--out`, a
line each, and mutants that are there are skipped. Nothing in the working tree changes: mutants live in a copy.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
SWAPS = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "+",
    ast.Pow: "*",
    ast.And: "or",
    ast.Or: "and",
    ast.BitAnd: "|",
    ast.BitOr: "&",
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "max", "first": "last", "amin": "amax"}
# Settings whose other value is as right, or only more forgiving.
HARMLESS = {"strict", "stable", "exist_ok", "parents", "missing_ok", "ignore_errors"}
MISSED = "survived"


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    before: str
    after: str


def mutants(file: Path) -> Iterator[Mutant]:
    """All mutants of a file; not in annotations, defaults of dataclasses, docstrings or the texts of errors."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef):
            for node in inside(function):
                for start, end, new in changes(node, lines):
                    old = lines[node.lineno - 1]
                    yield Mutant(str(file.relative_to(ROOT)), node.lineno, old, old[:start] + new + old[end:])


def inside(function: ast.FunctionDef) -> Iterator[ast.AST]:
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Raise | ast.FunctionDef | ast.JoinedStr | ast.Assert):
            continue
        if isinstance(node, ast.keyword) and node.arg in HARMLESS:
            continue
        yield node
        if isinstance(node, ast.AnnAssign):
            waiting += [node.value] if node.value else []
        else:
            waiting += ast.iter_child_nodes(node)


def changes(node: ast.AST, lines: list[str]) -> Iterator[tuple[int, int, str]]:
    """`(from column, to column, new text)` on the node's first line."""
    pair = operands(node)
    if pair and pair[0].end_lineno == pair[1].lineno == node.lineno:
        start, end = pair[0].end_col_offset, pair[1].col_offset
        between = lines[node.lineno - 1][start:end]
        operator = between.strip(" ()")
        if operator and "(" not in between and ")" not in between:
            yield start, end, between.replace(operator, SWAPS[type(pair[2])])
    elif isinstance(node, ast.Constant) and node.end_lineno == node.lineno and type(node.value) in (int, float, bool):
        new = {True: "False", False: "True"}.get(node.value) if isinstance(node.value, bool) else repr(node.value + 1)
        yield node.col_offset, node.end_col_offset, new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) and node.operand.lineno == node.lineno:
        yield node.col_offset, node.operand.col_offset, ""
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield node.col_offset, node.end_col_offset, NAMES[node.id]


def operands(node: ast.AST) -> tuple[ast.expr, ast.expr, ast.AST] | None:
    if isinstance(node, ast.Compare):
        return node.left, node.comparators[0], node.ops[0]
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        return node.left, node.right, node.op
    if isinstance(node, ast.BoolOp):
        return node.values[0], node.values[1], node.op
    return None


def choose(count: int, seed: int) -> list[Mutant]:
    """As many from each pillar, at most one a line."""
    rng, chosen = random.Random(seed), []
    for pillar in ("structure", "samples", "vicl"):
        files = sorted((ROOT / "hf_effdl" / pillar).rglob("*.py"))
        everything = [mutant for file in files for mutant in mutants(file)]
        rng.shuffle(everything)
        by_line = {(mutant.file, mutant.line): mutant for mutant in everything}
        chosen += list(by_line.values())[: count // 3]
    return chosen


def tests_of(mutant: Mutant, contexts: Path | None) -> list[str]:
    """The tests that run the line, those of few lines first: they are about it."""
    if contexts is None:
        return []
    from coverage import CoverageData

    data = CoverageData(basename=str(contexts))
    data.read()
    file = next((name for name in data.measured_files() if name.endswith("/" + mutant.file)), None)
    lines = data.contexts_by_lineno(file) if file else {}
    return sorted({name.split("|")[0] for name in lines.get(mutant.line, []) if name})


def is_killed(mutant: Mutant, tests: list[str], workers: int, timeout: float) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__"))
        (copy.parent / "shared").symlink_to(ROOT.parent / "shared")
        file = copy / mutant.file
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        lines[mutant.line - 1] = mutant.after + "\n"
        file.write_text("".join(lines), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--durations=0", "-m", "not slow"]
        command += ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []
        env = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run([*command, *tests], cwd=copy, env=env, capture_output=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return True
        return done.returncode not in (0, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contexts", type=Path, help="a .coverage file with contexts")
    parser.add_argument("--whole", action="store_true", help="give survivors to the whole fast suite")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutants.jsonl")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    ready = {(row["file"], row["line"], row["after"]) for row in results}
    for mutant in choose(options.count, options.seed):
        if (mutant.file, mutant.line, mutant.after) in ready:
            continue
        tests = tests_of(mutant, options.contexts)
        killed = bool(tests) and is_killed(mutant, tests, options.workers, options.timeout)
        if not killed and (options.whole or not options.contexts):
            killed = is_killed(mutant, [], options.workers, options.timeout)
        results.append(asdict(mutant) | {"outcome": "killed" if killed else MISSED, "tests": len(tests)})
        with open(options.out, "a") as file:
            file.write(json.dumps(results[-1]) + "\n")
        print(results[-1]["outcome"], f"{mutant.file}:{mutant.line}", mutant.after.strip(), flush=True)
    killed = sum(row["outcome"] == "killed" for row in results)
    print(f"{killed} of {len(results)} killed")


if __name__ == "__main__":
    main()
