# SPDX-License-Identifier: Apache-2.0
"""Tables and reports of the benchmarks and studies."""

import contextlib
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

# The style of all figures.
STYLE = Path(__file__).parents[1] / "examples" / "style.mplstyle"
# Read at the start, before the program itself adds to the load.
LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
LIBRARIES = (
    "jax",
    "optax",
    "flax",
    "torch",
    "scikit-learn",
    "statsmodels",
    "google-benchmark",
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; all columns but the first are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(aligned)} |"

    rule = [
        "-" * width if n == 0 else f"{'-' * (width - 1)}:"
        for n, width in enumerate(widths)
    ]
    return "\n".join(map(line, [header, rule, *rows]))


def spread(values: np.ndarray, digits: int) -> str:
    """Format the mean ± the standard deviation over seeds."""
    # One seed has no sample deviation.
    deviation = np.std(values, ddof=min(1, len(values) - 1))
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def describe(settings: Mapping[str, Any]) -> str:
    """Format the settings of a study, as the lines under its table."""
    described = ", ".join(
        f"{name.replace('_', ' ')} {value if isinstance(value, str) else f'{value:g}'}"
        for name, value in settings.items()
    )
    return f"\nMean ± standard deviation over the seeds. Settings: {described}."


def write(module: str, text: str, folder: Path) -> None:
    """Print and save a report with the command, machine and versions that made it.

    Args:
      module: the program, such as "benchmarks.merge"; the file is `folder/merge.md`.
      text: Markdown: a title, what was measured, tables.
      folder: is created if missing.
    """
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    load = "" if LOAD is None else f" Load average at the start: {LOAD:.1f}."
    text = f"{text.strip()}\n\nBy `{command}` on {machine()}.{load}\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{module.rpartition('.')[2]}.md"
    path.write_text(text, encoding="utf-8")
    print(text)


def machine() -> str:
    """Name the processor, its cores, and the versions of Python and the libraries."""
    versions = []
    for library in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(library).partition("+")[0]
            versions.append(f"{library} {version}")
    return (
        f"{os.cpu_count()} cores of {_processor()}, Python"
        f" {platform.python_version()}, {', '.join(versions)}"
    )


def _processor() -> str:
    with contextlib.suppress(OSError):  # only Linux has the file
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
