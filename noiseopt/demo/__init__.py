"""The demo: a byte-level GPT trained on Python's own source, with AdamW and with NoiseAwareAdamW.

Both optimizers see the same micro-batches in the same order, from the same weights, under the same
schedule.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from noiseopt.demo.train import Settings

if TYPE_CHECKING:
    from noiseopt.demo.run import Demo


def prepare(settings: Settings, out: Path, name: str, force: bool, track: bool) -> "Demo":
    """Check what the demo needs and make its folder.

    Args:
        settings: what is trained, and for how long.
        out: the folder of all runs.
        name: the run's name; a second run of a name gets name-2.
        force: replace an earlier run of the name instead.
        track: log to wandb, where it is installed.

    Raises:
        ModuleNotFoundError: the demo's extra is not installed; says what to install.
        ValueError: the name is not that of a folder.
        FileExistsError: with `force`, what is there is not a run.
    """
    missing = [module for module in ("rich", "matplotlib") if find_spec(module) is None]
    if missing:
        names = " and ".join(missing)
        raise ModuleNotFoundError(f"the demo needs {names}: pip install 'noiseopt[demo]'")
    from noiseopt.demo.folder import make
    from noiseopt.demo.run import Demo

    tracked = track and find_spec("wandb") is not None
    return Demo(settings, make(out, name, force), tracked)
