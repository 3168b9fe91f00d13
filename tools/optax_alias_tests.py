# SPDX-License-Identifier: Apache-2.0
"""Runs optax's own tests of its optimizers with `asgd` put into their table.

The installed optax ships `alias_test.py`; a copy of it, with rows of ours in the
place of its own, is run from a temporary folder. Needs absl-py, scikit-learn and
pytest. Further arguments go to pytest.
"""

import importlib.util
import pathlib
import sys
import tempfile

import pytest

TABLE = "_OPTIMIZERS_UNDER_TEST = (\n"

# One test wants the Rosenbrock function solved in 10,000 steps, of complex numbers
# too, for which no constant rate is both stable at its end and quick enough.
ROWS = f"""
import asgd_optax
import optax

# The tests look an optimizer up by its name in optax's own module.
alias.asgd = asgd_optax.asgd
_RATE = optax.cosine_decay_schedule(2e-3, 3000, alpha=0.53)
{TABLE}
    {{'opt_name': 'asgd', 'opt_kwargs': {{'learning_rate': _RATE, 'lambd': 0.0}}}},
    {{'opt_name': 'asgd', 'opt_kwargs': {{
        'learning_rate': _RATE, 'lambd': 1e-6, 't0': 100.0}}}},
    {{'opt_name': 'asgd', 'opt_kwargs': {{
        'learning_rate': _RATE, 'lambd': 1e-6, 't0': 100.0, 'compensated': True}}}},
)
_THEIRS = (
"""


def main(arguments):
    spec = importlib.util.find_spec("optax._src.alias_test")
    if spec is None or spec.origin is None:
        raise SystemExit("the installed optax ships no alias_test.py")
    source = pathlib.Path(spec.origin).read_text()
    if source.count(TABLE) != 1:
        raise SystemExit("optax's table of optimizers is not where it was")
    source = source.replace(TABLE, ROWS)
    with tempfile.TemporaryDirectory() as folder:
        test = pathlib.Path(folder, "alias_test.py")
        test.write_text(source)
        options = ["--rootdir", folder, "-c", "/dev/null", "-p", "no:cacheprovider"]
        return pytest.main([str(test), "-k", "AliasTest", *options, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
