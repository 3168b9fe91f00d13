# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of programs."""

import pytest

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def error_of(main, argv, capsys):
    """Return the one line with which a program rejects its arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line
