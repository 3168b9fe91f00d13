# SPDX-License-Identifier: Apache-2.0
"""The averaging command, killed again and again, for `test_average_command.py`.

    python -m tests.command_process RUN FOLDER KILLS

runs it once to the end, then as often as KILLS says, each time in a process of its own
that is killed after another share of the time the first took; then at the moments
right before and right after the rename. Their outputs are numbered in FOLDER.
"""

import os
import pathlib
import signal
import sys
import time

# All that takes long to import is there before the processes are forked.
import orbax.checkpoint  # noqa: F401
import tqdm  # noqa: F401

from asgd_optax.checkpoints import __main__

RENAME = pathlib.Path.rename


def in_a_process(run, output, begin=lambda: None, wait=None):
    """Runs the command; kills it after so many seconds. The seconds it took."""
    started, start = os.pipe()
    if (child := os.fork()) == 0:
        begin()
        os.write(start, b"!")
        __main__.main(["average", run, "--output", str(output)])
        os._exit(0)
    os.read(started, 1)
    begun = time.monotonic()
    if wait is not None:
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return time.monotonic() - begun


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_the_rename():
    pathlib.Path.rename = lambda *_: kill()


def kill_after_the_rename():
    pathlib.Path.rename = lambda *paths: (RENAME(*paths), kill())


def main(run, folder, kills):
    folder = pathlib.Path(folder)
    took = in_a_process(run, folder / "whole")
    for n in range(int(kills)):
        in_a_process(run, folder / str(n), wait=took * (n + 0.5) / int(kills))
    in_a_process(run, folder / "before", kill_before_the_rename)
    in_a_process(run, folder / "after", kill_after_the_rename)
    # What a killed one has left is not in the way of the next.
    in_a_process(run, folder / "before")


if __name__ == "__main__":
    main(*sys.argv[1:])
