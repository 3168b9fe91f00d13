# SPDX-License-Identifier: Apache-2.0
"""What the tests of the examples need: how a program refuses, and what it explains."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def error_of(main, argv, capsys, code=2):
    """The one line on stderr with which a program ends; on stdout there is nothing."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith("\n")
    (line,) = printed.err.splitlines()
    return line


def assert_explained(main, options, capsys):
    """`--help` gives each option's default."""
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    explained = capsys.readouterr().out
    for option in options:
        description = explained.split(f"\n  {option} ")[1].split("\n  --")[0]
        assert "default: " in " ".join(description.split()), option


def assert_refuses_outputs(main, folder, capsys):
    """`--output` must name a figure that can be written; nothing else is touched."""
    (folder / "file").write_bytes(b"no folder")
    (folder / "figure.xyz").write_bytes(b"no figure")
    (folder / "folder.png").mkdir()
    before = sorted(folder.rglob("*"))
    for path in (
        "figure",
        "figure.xyz",
        "file/figure.png",
        "folder.png",
        f"{'long' * 99}.png",
    ):
        argv = ["--output", str(folder / path)]
        assert "--output" in error_of(main, argv, capsys), path
        assert sorted(folder.rglob("*")) == before
        assert (folder / "figure.xyz").read_bytes() == b"no figure"


def contents(folder):
    """All that is in a folder, by its path: a file's bytes, None for a folder."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def command_line_of(lesson, monkeypatch):
    """The command line of a lesson, as a function of its arguments."""

    def run(argv):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / f"{lesson}.py"), *argv])
        runpy.run_path(sys.argv[0], run_name="__main__")

    return run


def assert_lesson_refuses(lesson, folder, monkeypatch, capsys):
    """One line before the training, and no file is touched, where an option is bad."""
    run = command_line_of(lesson, monkeypatch)
    assert "--speed" in error_of(run, ["--speed", "1"], capsys)
    (folder / "file").write_bytes(b"no folder")
    (folder / "figure.xyz").write_bytes(b"no figure")
    (folder / "folder.png").mkdir()
    before = contents(folder)
    for path in ("figure.xyz", "file/figure.png", "folder.png", f"{'long' * 99}.png"):
        argv = ["--output", str(folder / path)]
        assert "--output" in error_of(run, argv, capsys), path
        assert contents(folder) == before
