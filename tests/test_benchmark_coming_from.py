# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/coming_from.py`: its table, and bad options."""

import numpy as np

from benchmarks import coming_from
from tests.programs import error_of

# Where 16 bits leave theirs; None where they fail.
SIXTEEN_BITS = {
    "`nnx.EMA`": 1.0,
    "`optax.ema` of parameters": 1.0234375,
    "`optax.incremental_update`": 1.0,
    "`hk.EMAParamsTree`": np.nan,
    "`hk.EMAParamsTree`, `warmup_length`": None,
    "Keras `use_ema`": 1.0,
}


def test_table(capsys):
    rows = coming_from.main([], long_steps=2000)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" |")[0][2:] for line in lines] == list(coming_from.PEERS)
    assert {"`optax.ema` of parameters", "`optax.incremental_update`"} <= set(rows)
    for name, row in rows.items():
        assert row.difference < 5e-14
        theirs, ours, true = row.jump
        assert abs(ours - true) < 1e-5
        if SIXTEEN_BITS[name] is None:
            assert theirs is None
        else:
            np.testing.assert_equal(theirs, SIXTEEN_BITS[name])
        assert row.errors[1] < 3e-6
    # Of the sum of a decay rounded in float32 and one minus it, which is not 1.
    assert rows["`optax.incremental_update`"].errors[0] > 2e-5


def test_a_bad_option_is_refused_in_one_line(capsys):
    message = error_of(coming_from.main, ["--speed", "1"], capsys)
    assert "--speed" in message
