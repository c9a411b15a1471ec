"""Run a script whose second rank is killed inside a window, in the first attempt only.

    torchrun killed.py SCRIPT ARGUMENTS

KILL_AT in the environment says how many calls of `step()` are let pass at least.
"""

import itertools
import os
import runpy
import signal
import sys

from torch.optim.optimizer import register_optimizer_step_pre_hook


def kill_inside_a_window(after):
    calls = itertools.count()

    def hook(optimizer, args, kwargs):
        if next(calls) >= after and not optimizer.applied:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_pre_hook(hook)


def main():
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        kill_inside_a_window(int(os.environ["KILL_AT"]))
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
