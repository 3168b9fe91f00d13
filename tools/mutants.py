# SPDX-License-Identifier: Apache-2.0
"""Changes the library a little, and tells which of the changes no test notices.

`python -m tools.mutants [MODULE ...]`: each mutant is one module with one change,
made by cosmic-ray, in a copy of the sources under `build/mutants/`. The tests that
concern the module run on it, in a process of their own, until the first that fails:
then it is killed. Of modules that make no numbers a sample is run.

What was killed is kept in `build/mutants/MODULE.json` while its module stays as it is:
a second run takes up where the first stopped, and tries the survivors anew. Remove
the file to try all of them. What is listed as equivalent is not run, but by
`--equivalent`, and then has to survive.

Why not mutmut: it leaves decorated functions as they are, and here `jax.jit` decorates
the very ones that make the numbers.
"""

import argparse
import ast
import functools
import importlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

ROOT = pathlib.Path(__file__).parents[1]
BUILD = ROOT / "build" / "mutants"
SOURCES = BUILD / "sources"
EQUIVALENT = ROOT / "tools" / "equivalent_mutants.toml"

# Modules that make numbers, and the tests that concern them, the quickest first; the
# module's own doctests come last.
NUMBERS = {
    "_weightings": "weightings average_iterates running_average",
    "_posthoc_coefficients": "posthoc_coefficients",
    "_combine_averages": "combine_averages average_checkpoints",
    "_running_average": "running_average host_memory",
    "_asgd": "checks asgd torch_parity conformance",
    "_averaging": "averaging host_memory asgd average_iterates flax conformance",
    "_numerics": "averaging asgd average_iterates nt_asgd conformance",
    "_nt_asgd": "nt_asgd conformance",
    "_average_iterates": "average_iterates averaging conformance",
    "_random_scaling": "random_scaling conformance",
    "_track_random_scaling": "random_scaling conformance",
    "_running_random_scaling": "random_scaling conformance",
}
OTHERS = {
    "_checks": "checks asgd interop running_average average_checkpoints",
    "interop": "interop",
    "_torch_state": "interop",
    "flax": "flax",
    "_batch_norm_linen": "flax",
    "_batch_norm_nnx": "flax",
    "_averaged_params": "averaged_params",
    "_find_states": "averaged_params interop",
    "checkpoints": "decay_coefficients average_checkpoints",
    "_combine_checkpoints": "average_checkpoints",
    "_orbax_checkpoints": "average_checkpoints average_command",
    "_average_command": "average_command",
}
TESTS = NUMBERS | OTHERS
SAMPLE, SEED = 200, 0
KILLED, SURVIVED = "killed", "survived"
MEMORY = 12 * 2**30  # bytes, so that a mutant does not fill the machine's

# cosmic-ray has every operator in place of every other. Here each gets the one or two
# that a slip would put there.
REPLACEMENTS = {
    "BinaryOperator": "Add_Sub Sub_Add Mul_Div Div_Mul Pow_Mul FloorDiv_Div"
    " Mod_FloorDiv LShift_RShift RShift_LShift BitAnd_BitOr BitOr_BitAnd BitXor_BitAnd",
    "ComparisonOperator": "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE"
    " GtE_Gt GtE_Lt Is_IsNot IsNot_Is",
    "UnaryOperator": "Delete_USub Delete_Not Delete_Invert",
}
OPERATORS = [
    "NumberReplacer",
    "AddNot",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "ExceptionReplacer",
    "ZeroIterationForLoop",
    *(
        f"Replace{kind}_{pair}"
        for kind, pairs in REPLACEMENTS.items()
        for pair in pairs.split()
    ),
]
# What it lacks: these, and the branches of `where`.
SWAPS = {
    "+=": "-=",
    "-=": "+=",
    "*=": "/=",
    "/=": "*=",
    "maximum": "minimum",
    "minimum": "maximum",
    "max": "min",
    "min": "max",
    "all": "any",
    "any": "all",
    "real": "imag",
    "imag": "real",
    "expm1": "exp",
    "log1p": "log",
}


class Swap(Operator):
    """An augmented assignment, or a function that is called, for its opposite."""

    def mutation_positions(self, node):
        if getattr(node, "value", None) in SWAPS and (
            node.type == "operator" or node.get_next_leaf().value == "("
        ):
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        node.value = SWAPS[node.value]
        return node

    @classmethod
    def examples(cls):
        return ()


class SwapBranches(Operator):
    """`where(c, b, a)` for `where(c, a, b)`, and so with `select`."""

    def mutation_positions(self, node):
        if node.type == "arglist" and len(node.children) >= 5:
            bracket = node.get_previous_sibling()
            if bracket is not None and bracket.get_previous_leaf().value in {
                "where",
                "select",
            }:
                yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        children = node.children
        children[2], children[4] = children[4], children[2]
        return node

    @classmethod
    def examples(cls):
        return ()


OWN_OPERATORS = Swap(), SwapBranches()


class Mutant(NamedTuple):
    """One change, known by the lines it changes and not by their numbers.

    `number` tells apart those that look the same in one function.
    """

    module: str
    function: str
    before: str
    after: str
    number: int

    def diff(self) -> str:
        lines = [f"-{line}" for line in self.before.split("\n")]
        lines += [f"+{line}" for line in self.after.split("\n")]
        number = f" (number {self.number})" if self.number else ""
        return "\n".join([f"@@ {self.module}: {self.function}{number}", *lines])


def source_of(module: str) -> pathlib.Path:
    return pathlib.Path("asgd_optax", f"{module}.py")


@functools.cache
def text_of(module: str) -> str:
    """The module as it was when this began, whatever becomes of it meanwhile."""
    return (ROOT / source_of(module)).read_text()


def mutants_of(module: str) -> dict[Mutant, str]:
    """The mutants of a module, each with the module's text in it."""
    text = text_of(module)
    seen, counts, mutants = {meaning(text)}, Counter(), {}
    for mutated in mutations(text):
        try:
            what = meaning(mutated)
        except SyntaxError:
            continue
        if what in seen:
            continue
        seen.add(what)
        line, before, after = changed_lines(text, mutated)
        known_by = module, function_at(text, line), before, after
        mutants[Mutant(*known_by, counts[known_by])] = mutated
        counts[known_by] += 1
    return mutants


def mutations(text: str) -> Iterator[str]:
    for operator in (
        *(get_operator(f"core/{name}")() for name in OPERATORS),
        *OWN_OPERATORS,
    ):
        occurrence = 0
        while (mutated := mutate_code(text, operator, occurrence)) is not None:
            yield mutated
            occurrence += 1


def meaning(text: str) -> str:
    """What tells one program from another: not their annotations.

    Of `not a < b` and `a >= b`, which differ at NaN, one is kept.
    """
    return ast.dump(Bare().visit(ast.parse(text)))


class Bare(ast.NodeTransformer):
    """Drops annotations and which arguments have to be named: they compute nothing."""

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    def visit_arguments(self, node):
        self.generic_visit(node)
        node.args = node.posonlyargs + node.args + node.kwonlyargs
        node.defaults += filter(None, node.kw_defaults)
        node.posonlyargs, node.kwonlyargs, node.kw_defaults = [], [], []
        return node

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_AnnAssign(self, node):
        if node.value is None or "TypeAlias" in ast.dump(node.annotation):
            return None
        return ast.Assign([node.target], self.visit(node.value))

    def visit_UnaryOp(self, node):
        """What several operators make, in one form: `not not a`, `not a is b`."""
        self.generic_visit(node)
        opposite = {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Eq: ast.NotEq}
        opposite |= {ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.LtE: ast.Gt}
        opposite |= {ast.Gt: ast.LtE, ast.GtE: ast.Lt}
        match node:
            case ast.UnaryOp(ast.Not(), ast.UnaryOp(ast.Not(), operand)):
                return operand
            case ast.UnaryOp(ast.Not(), ast.Compare(ops=[op])) if type(op) in opposite:
                node.operand.ops = [opposite[type(op)]()]
                return node.operand
        return node


def changed_lines(text: str, mutated: str) -> tuple[int, str, str]:
    """The number of the first line that differs, and the lines before and after."""
    old, new = text.split("\n"), mutated.split("\n")
    pairs = zip(old, new, strict=False)
    first = next(i for i, (a, b) in enumerate(pairs) if a != b)
    while old[-1] == new[-1] and min(len(old), len(new)) > first + 1:
        del old[-1], new[-1]
    before, after = (
        "\n".join(" ".join(line.split()) for line in lines[first:])
        for lines in (old, new)
    )
    return first + 1, before, after


def function_at(text: str, line: int) -> str:
    """The names of the definitions around a line, the outermost first."""
    definitions = ast.FunctionDef | ast.ClassDef
    names = [
        (node.lineno, node.name)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, definitions) and node.lineno <= line <= node.end_lineno
    ]
    return ".".join(name for _, name in sorted(names))


def choose(made: dict[str, dict[Mutant, str]]) -> dict[str, list[Mutant]]:
    """What is run of each module: all mutants, or its part of the sample."""
    every = sorted(m for module in OTHERS for m in made.get(module, ()))
    sample = set(random.Random(SEED).sample(every, min(SAMPLE, len(every))))
    return {
        module: [m for m in mutants if module in NUMBERS or m in sample]
        for module, mutants in made.items()
    }


def copy_sources() -> None:
    """What git knows or does not ignore, where a mutant can do no harm."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).exists():
            (SOURCES / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, SOURCES / name)


def try_mutants(module: str, mutants: dict[Mutant, str]) -> None:
    """Runs the module's tests on each mutant."""
    # Twice: the first fills the cache of compiled programs.
    for _ in range(2):
        outcome, output, seconds = timed_tests(module, None)
        if outcome != SURVIVED:
            sys.exit(f"{module}: its tests fail as it is\n{output}")
    print(f"{module}: {len(mutants)} to try; {seconds:.1f} s as it is", flush=True)
    path = SOURCES / source_of(module)
    original = path.read_text()
    for mutant, text in mutants.items():
        path.write_text(text)
        outcome, _, took = timed_tests(module, 30 + 3 * seconds)
        path.write_text(original)
        print(f"{outcome} after {took:.1f} s\n{mutant.diff()}", flush=True)
        if outcome in {KILLED, SURVIVED}:
            save(mutant, outcome)


def timed_tests(module: str, limit: float | None) -> tuple[str, str, float]:
    """What became of the module as it lies there, what pytest said, and seconds."""
    files = [f"tests/test_{name}.py" for name in TESTS[module].split()]
    files.append(str(source_of(module)))
    options = ["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        # A copy of this process, which has what takes long to import.
        child = os.fork()
        if child == 0:
            code = pytest.ExitCode.INTERNAL_ERROR
            try:
                os.setsid()
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                code = pytest.main(options + files)
            finally:
                # Whatever was raised: what comes next is the parent's.
                os._exit(code)
        code = None
        try:
            while code is None:
                time.sleep(0.02)
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    code = os.waitstatus_to_exitcode(status)
                elif limit and time.monotonic() > started + limit:
                    kill(child)
        finally:
            # Where this is interrupted: a session of its own does not hear of that.
            if code is None:
                kill(child)
        output.seek(0)
        said = output.read().decode(errors="replace")
    outcome = KILLED if code else SURVIVED
    if code > pytest.ExitCode.INTERRUPTED:
        outcome = f"not run: pytest ended with {code}"
    return outcome, said, time.monotonic() - started


def kill(session: int) -> None:
    """Ends the tests, and the processes that they have started."""
    os.killpg(session, signal.SIGKILL)


def outcomes(module: str) -> dict[Mutant, str]:
    """What became of the mutants of the module as it is that were tried."""
    path = results_of(module)
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("source") != text_of(module):
        return {}
    return {Mutant(*key): outcome for *key, outcome in kept["tried"]}


def save(mutant: Mutant, outcome: str) -> None:
    tried = outcomes(mutant.module) | {mutant: outcome}
    listed = [[*mutant, outcome] for mutant, outcome in tried.items()]
    content = json.dumps({"source": text_of(mutant.module), "tried": listed}, indent=1)
    results_of(mutant.module).write_text(content)


def results_of(module: str) -> pathlib.Path:
    return BUILD / f"{module}.json"


def equivalent() -> dict[Mutant, str]:
    """The mutants that no test can kill, and why."""
    entries = tomllib.loads(EQUIVALENT.read_text()).get("mutant", [])
    return {
        Mutant(
            *(entry[name] for name in Mutant._fields[:-1]), entry.get("number", 0)
        ): entry["why"]
        for entry in entries
    }


def report(
    made: dict[str, dict[Mutant, str]],
    chosen: dict[str, list[Mutant]],
    same: dict[Mutant, str],
) -> str:
    """The table, and what is alive. What is in no column has not been tried."""
    columns = "made", "chosen", "killed", "equivalent", "as exact", "alive"
    rows, alive = {}, []
    for module, mutants in chosen.items():
        tried = outcomes(module)
        why = [same[m] for m in mutants if m in same]
        exact = sum(reason.startswith("as exact") for reason in why)
        left = [m for m in mutants if m not in same and m in tried]
        dead = [m for m in left if tried[m] == KILLED]
        row = [len(dead), len(why) - exact, exact, len(left) - len(dead)]
        rows[f"`{module}`"] = [len(made[module]), len(mutants), *row]
        alive += [m for m in left if m not in dead]
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = [f"| module | {' | '.join(columns)} |", "| :-- |" + " --: |" * len(columns)]
    lines += [f"| {name} | {' | '.join(map(str, row))} |" for name, row in rows.items()]
    return "\n".join([*lines, "", *(mutant.diff() for mutant in alive), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="by default all")
    parser.add_argument("--report", action="store_true", help="run none")
    parser.add_argument(
        "--equivalent", action="store_true", help="run those listed as equivalent alone"
    )
    options = parser.parse_args()
    modules = options.modules or list(TESTS)
    if unknown := set(modules) - set(TESTS):
        parser.error(f"no such module: {', '.join(sorted(unknown))}")
    # The sample is one of all of them.
    needed = [
        m for m in TESTS if m in modules or (m in OTHERS and OTHERS.keys() & modules)
    ]
    made = {module: mutants_of(module) for module in needed}
    chosen = choose(made)
    same = equivalent()
    stale = {m for m in same if m.module in made} - {
        m for x in made.values() for m in x
    }
    if stale:
        sys.exit("no such mutants\n" + "\n".join(m.diff() for m in stale))
    if not options.report:
        copy_sources()
        os.chdir(SOURCES)
        os.environ["PYTHONPATH"] = str(SOURCES)
        sys.path.insert(0, str(SOURCES))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(BUILD / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        # Not the library: it is imported where it is tested.
        for name in ("chex", "jax", "optax", "scipy.integrate"):
            importlib.import_module(name)
        for module in modules:
            tried = outcomes(module)
            left = {
                m: made[module][m]
                for m in chosen[module]
                if (m in same) is options.equivalent and tried.get(m) != KILLED
            }
            if left:
                try_mutants(module, left)
    text = report(made, {module: chosen[module] for module in modules}, same)
    (BUILD / "report.md").write_text(text)
    print(text)
    told = {m for module in modules for m in same if outcomes(module).get(m) == KILLED}
    if told:
        sys.exit(
            "listed as equivalent, and killed\n" + "\n".join(map(Mutant.diff, told))
        )


if __name__ == "__main__":
    main()
