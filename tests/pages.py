# SPDX-License-Identifier: Apache-2.0
"""The Python code of the README and of the documentation, for the tests that run it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOW_TO = ROOT / "docs" / "how_to"
# Blocks, and cells that the documentation's build executes. A cell may have options.
BLOCK = re.compile(
    r"^```(?:\{code-cell\} )?python\n(?:---\n.*?^---\n)?(.*?)^```$", re.M | re.S
)


def blocks_of(page: Path) -> list[str]:
    """Return the blocks, each after as many empty lines as there are lines above it."""
    text = page.read_text()
    found = BLOCK.finditer(text)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in found]


def run(block: str, page: Path, names: dict[str, object]) -> None:
    """Run a block; errors name its page and line."""
    exec(compile(block, page, "exec"), names)
