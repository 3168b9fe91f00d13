# SPDX-License-Identifier: Apache-2.0
"""The first programs of the README and of the framework pages, with other seeds.

    python -m studies.page_seeds

Each program trains a network on noisy targets and prints two test losses, of the last
iterate and of the EMA. This study runs the programs with other seeds in place of 0, and
counts how often the EMA has the lower loss.
"""

import contextlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tools import command_line, report

ROOT = Path(__file__).parents[1]
HOW_TO = ROOT / "docs" / "how_to"
PAGES = {
    "README": ROOT / "README.md",
    "Flax NNX": HOW_TO / "nnx.md",
    "Flax Linen": HOW_TO / "linen.md",
    "Equinox": HOW_TO / "equinox.md",
    "Haiku": HOW_TO / "haiku.md",
    "evaluate each epoch": HOW_TO / "evaluate_each_epoch.md",
}
SEEDS = 20
# A block of the README, or a cell of an executed page.
FENCE = r"^```(?:python|\{code-cell\} python)\n"
OPTIONS = r"(?:---\n.*?^---\n)?"
BLOCK = re.compile(rf"{FENCE}{OPTIONS}(.*?)^```$", re.M | re.S)


def program(page: Path, seed: int) -> str:
    """Return the Python blocks up to the first that prints, with another seed."""
    code = ""
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        code += block
        if "print(" in block:
            break
    # Keys and `nnx.Rngs`, of weights and of data.
    return re.sub(r"\b(key|Rngs)\(0\)", rf"\g<1>({seed})", code)


def losses(page: Path, seed: int) -> tuple[float, float]:
    """Run the first program of a page; return the losses that it prints last."""
    printed, names = io.StringIO(), {"__name__": "page"}
    with contextlib.redirect_stdout(printed):
        exec(program(page, seed), names)
    last, ema = (
        float(re.findall(rf"{name}:? +(\S+)", printed.getvalue())[-1])
        for name in ("last iterate", "EMA")
    )
    return last, ema


PAGE = """\
# First programs with other seeds

The first program of each page, with {seeds} seeds of the weights and the data. Test \
losses are means ± standard deviations over the seeds. *Least ratio*: the loss of the \
last iterate divided by that of the EMA, in the seed in which it is smallest.

{table}
"""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the programs, write the table, and return the losses by page."""
    parser = command_line.report_parser("Run the first programs with other seeds.")
    options = parser.parse_args(argv)
    seeds = 2 if options.quick else SEEDS
    pages = dict(list(PAGES.items())[:1]) if options.quick else PAGES
    rows, measured = [], {}
    for name, page in pages.items():
        runs = [losses(page, seed) for seed in tqdm(range(seeds), desc=name)]
        last, ema = measured[name] = np.array(runs).T
        spreads = report.spread(last, 4), report.spread(ema, 4)
        wins = f"{np.sum(ema < last)} of {seeds}"
        rows.append([name, *spreads, wins, f"{np.min(last / ema):.1f}"])
    header = ["page", "last iterate", "EMA", "EMA is lower", "least ratio"]
    text = PAGE.format(seeds=seeds, table=report.table(header, rows))
    report.write("studies.page_seeds", text, options.output)
    return measured


if __name__ == "__main__":
    main()
