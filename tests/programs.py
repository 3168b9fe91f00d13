# SPDX-License-Identifier: Apache-2.0
"""What tests of programs need: how one refuses options, and how it explains them."""

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


def assert_study_options(main, capsys, others=()):
    """The options of a study, those that most have and others: refused and explained.

    Args:
      main: the study's, of its arguments.
      capsys: pytest's.
      others: pairs of an option and a value that is refused, beside the usual ones.
    """
    refused = [
        *(("--rate", value) for value in ("0", "nan", "fast")),
        *(("--steps", value) for value in ("0", "1.5", "9" * 20)),
        *(("--seeds", value) for value in ("1", "9" * 20)),
        *others,
    ]
    for option, value in [*refused, ("--speed", "1")]:
        line = error_of(main, [f"{option}={value}"], capsys)
        assert option in line, (option, value)
    assert_explained(main, dict(refused), capsys)


def contents(folder):
    """All that is in a folder, by its path: a file's bytes, None for a folder."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def hide(package, monkeypatch):
    """From now on a package is not installed."""

    class Without:
        def find_spec(self, name, path=None, target=None):
            if name == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    # Not None among the modules: SciPy looks for arrays of torch's there.
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Without(), *sys.meta_path])


def command_line_of(lesson, monkeypatch):
    """The command line of a lesson, as a function of its arguments."""

    def run(argv):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / f"{lesson}.py"), *argv])
        runpy.run_path(sys.argv[0], run_name="__main__")

    return run


def assert_refuses_outputs(main, folder, capsys, others=()):
    """`--output` must name a figure that can be written; no file is touched."""
    (folder / "file").write_bytes(b"no folder")
    (folder / "figure.xyz").write_bytes(b"no figure")
    (folder / "folder.png").mkdir()
    before = contents(folder)
    long = f"{'long' * 99}.png"
    for path in ("figure", "figure.xyz", "file/figure.png", "folder.png", long):
        argv = [*others, "--output", str(folder / path)]
        assert "--output" in error_of(main, argv, capsys), path
        assert contents(folder) == before


def assert_lesson_refuses(lesson, folder, monkeypatch, capsys):
    """One line before the training, and no file is touched, where an option is bad.

    Nor is a picture touched by a run that is stopped before it has another.
    """
    run = command_line_of(lesson, monkeypatch)
    picture = folder / "picture.png"
    picture.write_bytes(b"a picture")
    argv = ["--output", str(picture)]
    assert "--speed" in error_of(run, [*argv, "--speed", "1"], capsys)
    assert_refuses_outputs(run, folder, capsys)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm", stop)
    monkeypatch.setattr("tqdm.trange", stop)
    with pytest.raises(KeyboardInterrupt):
        run(argv)
    assert picture.read_bytes() == b"a picture"
