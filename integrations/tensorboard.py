"""TensorBoard: an observer that adds each decision to a writer, under the names of `metrics`.

    writer = torch.utils.tensorboard.SummaryWriter(...)
    optimizer.add_observer(TensorBoardObserver(writer))

Steps are the samples seen (or micro-batches, if their size is not told), in whole numbers. Every
change is a text with its reason, under `decide/changes`.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from noiseopt.control import Decision, Start, metrics
from noiseopt.integrations.sink import Sink

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardObserver:
    """Log each decision to a writer. Trouble with it is warned of once and never stops training.

    Args:
        writer: the writer, which stays the loop's to close. In a distributed run only rank 0 has
            one.
        prefix: put before every name, such as "critic/" for the second of two optimizers.
    """

    def __init__(self, writer: "SummaryWriter", *, prefix: str = "") -> None:
        self._sink, self._prefix = Sink(writer, "TensorBoard"), prefix
        self._groups: tuple[str, ...] = ()

    def on_start(self, now: Callable[[], Start]) -> None:
        """Decisions begin, or begin anew after a load: keep the settings as a text."""
        start = now()
        self._groups = start.groups
        settings = f"    {json.dumps(asdict(start.config))}"  # indented: a block of code
        self._text("decide/config", settings, int(start.state.estimator.samples_seen))

    def __call__(self, decision: Decision) -> None:
        """Log a decision; values that are not finite are left out."""
        step = int(decision.samples_seen)
        values = metrics(decision, self._groups)
        self._sink.write(lambda writer: _add_scalars(writer, self._prefix, values, step))
        if decision.action != "hold":
            window = f"{decision.action} to {decision.accumulation_steps}"
            self._text("decide/changes", f"{window}: {decision.reason}", step)

    def _text(self, name: str, text: str, step: int) -> None:
        self._sink.write(lambda writer: writer.add_text(self._prefix + name, text, step))


def _add_scalars(writer: "SummaryWriter", prefix: str, values: dict[str, float], step: int) -> None:
    for name, value in values.items():
        writer.add_scalar(prefix + name, value, step)
