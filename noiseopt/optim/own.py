"""Windows inside `accumulate` under DDP: until they end each rank keeps its own gradients."""

import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from noiseopt.adaptation import Adaptation
from noiseopt.capture import GradientWindow, LocalNorms
from noiseopt.optim.put_off import forgotten_if_it_raises, have_gradient
from noiseopt.parallel import finds_unused

Groups = Sequence[Sequence[Tensor]]


class OwnGradients:
    """The micro-batches of the open window whose gradients DDP leaves to their ranks.

    Args:
        window: the open window.
        local: what is not to read these, as they are to be had at `step()`.
        adaptation: says how long windows are, and which modules average gradients.
        always: whether the optimizer averages all gradients by itself.
        external: whether the loop accumulates them in `p.grad`, which DDP then averages.

    Attributes:
        next_is_own: whether the gradient of the micro-batch that comes is this rank's own.
        always: whether all are.
    """

    def __init__(
        self,
        window: GradientWindow,
        local: LocalNorms | None,
        adaptation: Adaptation,
        always: bool,
        external: bool,
    ) -> None:
        self._window, self._local, self._adaptation = window, local, adaptation
        self._external = external
        self._have_averaged: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._inside = 0  # contexts of accumulate() for a micro-batch of this rank's own
        self._unstepped = False  # whether such a one awaits its step()
        self.next_is_own = self.always = always

    @contextmanager
    def accumulate(self, model: nn.Module, groups: Groups, taken: int) -> Iterator[None]:
        """Have this rank keep the gradients of a micro-batch.

        Args:
            model: what is trained, wrapped or not.
            groups: the parameters of each group.
            taken: the micro-batches that the window has had.
        """
        last = taken + 1 >= self._adaptation.steps
        wrappers = _averaging_modules(model, self._adaptation.ddp_around(groups, model))
        averages = last if self._external else self._leaves_averaging(wrappers, last)
        if averages:
            yield
            return
        if self._inside == 0:
            self.next_is_own = self._unstepped = not self._external
        with forgotten_if_it_raises(self.forget), self._unread(), _keeping_own(wrappers):
            yield

    def forget(self) -> None:
        """Forget the micro-batch that comes."""
        self.next_is_own, self._unstepped = self.always, False

    def note_averaged(self, ddp: Iterable[nn.Module]) -> None:
        """Take in that DDP modules have averaged a window."""
        self._have_averaged.update(ddp)

    def may_be_none(self, groups: Groups) -> bool:
        """Whether this micro-batch may leave nothing in `p.grad` on this rank."""
        return self.next_is_own and any(map(finds_unused, self._adaptation.ddp_around(groups)))

    def is_unstepped(self, groups: Groups) -> bool:
        """Whether the last micro-batch was thrown away instead of stepped."""
        return self._unstepped and self._inside == 0 and not have_gradient(groups)

    def _leaves_averaging(self, wrappers: Sequence[nn.Module], last: bool) -> bool:
        """Whether DDP had better average this micro-batch itself, while its backward runs.

        There is nothing to put off in a window of one, unless it is to be weighted; and DDP records
        a static graph in its first passes, for which it must average.
        """
        static = [wrapper for wrapper in wrappers if getattr(wrapper, "static_graph", False)]
        records = any(wrapper not in self._have_averaged for wrapper in static)
        if self.always and records:
            raise ValueError(
                "gradients='local' with DDP's static_graph=True: DDP must average in its first "
                "pass, to record the graph; leave out one of the two"
            )
        if self.always or not wrappers or self._window.alone:
            return False
        alone = last and len(self._window) == 0 and not self._adaptation.samples.are_told
        return records or alone

    @contextmanager
    def _unread(self) -> Iterator[None]:
        """Leave backwards unread: this rank's own gradients are to be had at `step()`."""
        self._go_inside(1)
        try:
            yield
        finally:
            self._go_inside(-1)

    def _go_inside(self, contexts: int) -> None:
        self._inside += contexts
        if self._local is not None:
            self._local.passes.paused = self._inside > 0


@contextmanager
def _keeping_own(wrappers: Iterable[nn.Module]) -> Iterator[None]:
    """Have DDP modules leave each rank its own gradients.

    Raises:
        RuntimeError: one has averaged all the same, since its forward was run before.
    """
    modules: list[Any] = list(wrappers)
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.no_sync())
        yield
    for module in modules:
        averages = getattr(module, "require_forward_param_sync", False)
        if averages and any(param.grad is not None for param in module.parameters()):
            raise RuntimeError(
                "the model averaged its gradients inside optimizer.accumulate(), since its forward "
                "was run before: run both, forward and backward, inside"
            )


def _averaging_modules(model: nn.Module, ddp: Collection[nn.Module]) -> list[nn.Module]:
    """What would average gradients: the DDP modules, whichever of them was given."""
    given: Any = getattr(model, "_orig_mod", model)
    others = [given] if hasattr(given, "no_sync") and given not in ddp else []
    return [*ddp, *others]
