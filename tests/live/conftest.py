# SPDX-License-Identifier: Apache-2.0
"""`test_X.py` is collected where the package X is installed."""

import importlib.util
from pathlib import Path

collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if importlib.util.find_spec(path.stem.removeprefix("test_")) is None
]
