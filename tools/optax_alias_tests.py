# SPDX-License-Identifier: Apache-2.0
"""Run optax's own tests of its optimizers, with `asgd` in their table.

The installed optax includes `alias_test.py`. A copy of it, with our rows instead of its
own, runs in a temporary folder. Needs absl-py, scikit-learn and pytest. Arguments are
passed to pytest.
"""

import importlib.util
import pathlib
import sys
import tempfile

import pytest

TABLE = "_OPTIMIZERS_UNDER_TEST = (\n"

# One test solves the Rosenbrock function in 10,000 steps, also with complex numbers. No
# constant learning rate is both stable at the end and fast enough for that.
ROWS = f"""
import asgd_optax
import optax

# The tests look up an optimizer by name in optax's own module.
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
        raise SystemExit("the installed optax does not include alias_test.py")
    source = pathlib.Path(spec.origin).read_text()
    if source.count(TABLE) != 1:
        raise SystemExit("optax's table of optimizers was not found")
    source = source.replace(TABLE, ROWS)
    with tempfile.TemporaryDirectory() as folder:
        test = pathlib.Path(folder, "alias_test.py")
        test.write_text(source)
        options = ["--rootdir", folder, "-c", "/dev/null", "-p", "no:cacheprovider"]
        return pytest.main([str(test), "-k", "AliasTest", *options, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
