"""What ranks have in common, held against each other at every update.

Along with a window's row go a few numbers of each rank and their squares. Their sums show whether
the ranks hold the same mean gradient and the same decision state, which they must, and whether they
see the same data or draw the same random numbers, which they should not: see `suspicions`.
"""

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from noiseopt.capture import (
    ENDED,
    Row,
    as_tensor,
    device_of,
    is_sharded,
    like,
    plain_norms,
    squared_norms,
)
from noiseopt.distributed import Ranks, digest, refuse_differing, spread
from noiseopt.parallel import DDPModules, finds_unused, ranks_of, refuse_join
from noiseopt.random_draws import RandomDraws
from noiseopt.suspicions import Suspicions

TOLERANCE = 1e-12  # of the relative variance of the mean gradient's squared norm
SAME = 1e-14  # what rounding leaves of the relative variance of equal numbers
TINY = 1e-30  # a squared norm; of smaller ones squares in fp32 may be zero
WINDOWS_AT_ONCE = 20  # of a run's first; mistakes in a loop show there
CHECKS = 5  # numbers that show whether ranks go together
CPU = torch.device("cpu")

Facts = Mapping[str, object]
Told = dict[str, Any]  # a rank's state, its settings, and how far it leads in these

logger = logging.getLogger("noiseopt")


class Agreement:
    """Sums rows over ranks and checks that the ranks go together.

    Args:
        ranks: those that take part.
        on_error: called before an error is raised because they do not go together.

    Attributes:
        ranks: those that take part.
        followed: the settings of other ranks that the last sum's update is to be made with, where
            this one is out of its turn.
        suspicions: what ranks that go together may still do wrong.
    """

    def __init__(self, ranks: Ranks, on_error: Callable[[Exception], None]) -> None:
        self.ranks = ranks
        self._on_error = on_error
        self._ddp = DDPModules()
        self._plain: list[Tensor] = []  # parameters beside FSDP2's, which every rank holds whole
        self._state: Facts = {}
        self._settings: Facts = {}
        self._lead = math.inf
        self.followed: Facts = {}
        self._digest = 0
        self._draws = RandomDraws(WINDOWS_AT_ONCE)
        self._sums: list[tuple[Row, Told]] = []  # of the checks, with what the digest was made of
        self._windows = 0
        self._end: Callable[[], None] | None = None
        self.suspicions = Suspicions(ranks)

    def see_ranks(
        self, groups: Sequence[Sequence[Tensor]], process_group: dist.ProcessGroup | None
    ) -> None:
        """See, before the first window, that the parameters are shared by these ranks.

        Raises:
            RuntimeError: there are others than when the hooks were set, or their process group
                cannot sum what is measured.
        """
        if ranks_of(groups, process_group) != self.ranks:
            raise RuntimeError(
                f"the optimizer was built for {self.ranks.all} rank(s) and now there are others: "
                "call torch.distributed.init_process_group() and fully_shard() before building it; "
                "and wrap the model in DDP before, or pass the optimizer a process_group, where "
                "DDP averages over some ranks only"
            )
        if self.ranks.all > 1:
            self.ranks.check_reach()
            self._ddp.around(groups)
        if self.ranks.sharded and self.ranks.model == 1:
            self._plain = [p for params in groups for p in params if not is_sharded(p)]

    def ddp_around(
        self, groups: Sequence[Sequence[Tensor]], model: nn.Module | None = None
    ) -> Collection[nn.Module]:
        """The DDP modules that wrap the parameters; see `DDPModules.around`."""
        return self._ddp.around(groups, model)

    def compare(self, facts: Facts) -> None:
        """See that every rank starts from the same facts: a collective.

        Raises:
            RuntimeError: ranks differ, which names what differs and how.
        """
        with self._telling_errors():
            self.ranks.compare(facts, "what they start from")

    @contextmanager
    def _telling_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._on_error(error)
            raise

    def set_state(self, state: Facts) -> None:
        """Say what the decisions to come rest on; it must be the same on all ranks."""
        if self.ranks.all > 1:
            self._state, self._digest = state, digest(state)

    def set_settings(self, settings: Facts, lead: float = math.inf) -> None:
        """Say what this update is made with; it must be the same on all ranks.

        Args:
            settings: by name.
            lead: finite where this rank takes part out of its loop's turn: its micro-batches in the
                window. Then those of the ranks with the most are followed, the same on these.
        """
        self._settings, self._lead = settings, lead

    def sum_(
        self,
        row: Row,
        num_groups: int,
        extra: Tensor | None,
        what: str,
        at_once: bool,
        plain: list[float] | None = None,
        shows_data: Tensor | None = None,
        left: Tensor | None = None,
    ) -> None:
        """Sum a row over the ranks, in place.

        What the row says of how the window ended stays this rank's. If not at once, and not among
        a run's first windows, the sum is made while the loop goes on, and ended by the next call of
        `sum_` or `check`: so no rank waits for a slower one.

        Args:
            row: from `Measured.row`. Of the mean gradient's norms, where ranks hold shards, this
                rank's share; otherwise all of them, which are checked to be the same on all ranks.
            num_groups: the parameter groups that it tells of.
            extra: further numbers to sum, in place.
            what: what is summed, for an error.
            at_once: whether the sums are needed now.
            plain: filled with the sums of the row and of `extra`, which waits for the device, once.
            shows_data: a number, 0-d, not zero, that ranks which see the same data have in common,
                for where others have the squared norm of their own gradients in common, too.
            left: what the backward has left in `p.grad`, as a squared norm, 0-d, if that must be
                the same on all ranks.

        Raises:
            RuntimeError: ranks do not go together, as far as the sums were read: on the CPU when
                they are there, elsewhere by `check`; or the loop is inside `model.join()`.
        """
        for module in self._ddp.living():
            refuse_join(module)
        self.followed = {}
        if not self.ranks.sharded:
            _divide(row, slice(num_groups, 2 * num_groups), self.ranks.all)
        with self._telling_errors():
            self._finish()
            numbers = self._with_checks(row, num_groups, extra, shows_data, left)
            told = {
                "state": self._state,
                "settings": self._settings,
                "lead": self._lead,
            }
            end_sum = self.ranks.begin_sum_(numbers, what)

        def end() -> None:
            end_sum()
            further = len(row) + 2 * CHECKS
            waits = isinstance(row, list) or plain is not None
            read: Any = numbers.tolist() if waits else numbers
            summed = read if isinstance(row, list) else numbers
            if extra is not None:
                extra.copy_(numbers[further:])
            if plain is not None:
                plain[:] = [*read[: len(row)], *read[further:]]
            row[:ENDED] = summed[: len(row) + ENDED]
            if self.ranks.model > 1:  # of counts no rank has a part
                _divide(row, slice(2 * num_groups, ENDED), self.ranks.model)
            self._sums.append((read[len(row) : further], told))

        self._end, self._windows = end, self._windows + 1
        if at_once or self._windows <= WINDOWS_AT_ONCE:
            with self._telling_errors():
                self._finish()

    def _with_checks(
        self,
        row: Row,
        num_groups: int,
        extra: Tensor | None,
        shows_data: Tensor | None,
        left: Tensor | None,
    ) -> Tensor:
        """What is summed: the row, what shows whether ranks go together, its squares, and more.

        Five numbers show it: what differs where ranks see different data; the squared norm of the
        mean gradient, which must be the same (where ranks hold shards, that of the parameters which
        are none); a digest of the decision state; one of the random state, nan where that is not
        looked at; what the backward has left, nan where that is not known.
        """
        own, mean = slice(num_groups), slice(num_groups, 2 * num_groups)
        drawn = self._draws.digest(self._windows, row.device if isinstance(row, Tensor) else CPU)
        state = digest((self._digest, self._settings))
        if isinstance(row, Tensor):
            of_all = row[mean].sum()
            if self.ranks.sharded:
                of_all = squared_norms([self._plain_grads()], row.device)[0]
            digests = row.new_full((), state), row.new_full((), drawn)  # which wait for nothing
            norm = row[own].sum() if shows_data is None else row[own].sum() * shows_data
            after = like(math.nan if left is None else left, row)
            told = torch.stack([norm.to(row.dtype), of_all.to(row.dtype), *digests, after])
            return torch.cat([row, told, told.square(), *([] if extra is None else [extra])])
        alike = plain_norms([self._plain_grads()])[0] if self.ranks.sharded else sum(row[mean])
        data = sum(row[own]) * (1.0 if shows_data is None else shows_data.item())
        plain = data, alike, state, drawn, math.nan if left is None else left.item()
        squares = (number * number for number in plain)
        rest = [] if extra is None else extra.tolist()
        return torch.tensor([*row, *plain, *squares, *rest], dtype=torch.float64, device=CPU)

    def _plain_grads(self) -> list[Tensor]:
        return [grad for param in self._plain if (grad := param.grad) is not None]

    def _finish(self, together: bool = True) -> None:
        """End the sum that was begun last, and read it where that waits for nothing else."""
        end, self._end = self._end, None
        if end is not None:
            end()
            if isinstance(self._sums[-1][0], list):
                self._read(together)

    def check(self, together: bool) -> None:
        """End and read all sums so far. This waits for the device.

        Args:
            together: whether every rank does so now, and may say what it holds.

        Raises:
            RuntimeError: gradients were not synchronised, or ranks hold different states.
        """
        with self._telling_errors():
            self._finish(together)
            self._read(together)

    def _read(self, together: bool) -> None:
        read, self._sums = self._sums, []
        lists: Any = [sums for sums, _ in read]
        if any(isinstance(sums, Tensor) for sums in lists):
            lists = torch.stack([*map(as_tensor, lists)]).tolist()
        for sums, (_, told) in zip(lists, read, strict=True):
            pairs = zip(sums[:CHECKS], sums[CHECKS:], strict=True)
            local, mean, state, drawn, left = (spread(a, b, self.ranks.all) for a, b in pairs)
            if mean > TOLERANCE:
                raise RuntimeError(
                    "gradients differ between ranks at step() (relative spread of the squared "
                    f"norm {mean:.2g}): the backward ran without synchronisation, for instance "
                    "under no_sync(), on a model that is not wrapped (also where the loop averages "
                    "gradients by itself, after a window's last backward), or on parameters that "
                    "fully_shard() was not given; synchronise the gradients, run each forward and "
                    "backward inside optimizer.accumulate(model) (of one optimizer, where two "
                    "share a model), or pass a process_group of the ranks that share them; updates "
                    "may have been made with them already: go on from a checkpoint"
                )
            if left > TOLERANCE:
                raise RuntimeError(
                    "what the backward had left in p.grad differed between ranks, and what step() "
                    "found did not: where the loop averages gradients in between, the ranks' own, "
                    "which show the noise, are not told apart from the mean; have "
                    "DistributedDataParallel average those of every parameter, or the optimizer, "
                    "by NoiseConfig(gradients='local'); and give the parameters in one order on "
                    "all ranks; an update may have been made with them already"
                )
            if state > SAME:
                self._follow_or_stop(told, together)
            self._see_origin(*sums[:2])
            if self.ranks.data == 1:  # of one model's parts each sees the same
                continue
            if not math.isnan(sums[0]):  # as in a window that is not measured
                self.suspicions.see_data(local < SAME and sums[0] > 0)
            if not math.isnan(sums[3]):
                self.suspicions.see_randomness(drawn < SAME and sums[3] > 0)

    def _follow_or_stop(self, own: Told, together: bool) -> None:
        what = "the state that decisions rest on, or the optimizer's settings"
        if not together:
            raise RuntimeError(f"ranks disagree on {what}")
        told = self.ranks.gather(own, what)
        first = max(each["lead"] for each in told)
        leading = next(each["settings"] for each in told if each["lead"] == first)
        for each in told:
            if each["lead"] < first or first == 0:  # when nobody brings anything
                each["settings"] = leading
        refuse_differing([{**each["state"], **each["settings"]} for each in told], what)
        if all(each["lead"] == math.inf for each in told):
            raise RuntimeError(f"ranks disagree on {what}")
        if own["lead"] < first:
            self.followed = leading

    def _see_origin(self, own: float, mean: float) -> None:
        """See that some rank's backward brought a part, where DDP allows that one's did not."""
        if own == 0 and TINY < mean < math.inf and any(map(finds_unused, self._ddp.living())):
            raise RuntimeError(
                "no rank has seen a backward pass bring what p.grad held at step(): the ranks' own "
                "gradients are read as loss.backward() brings them; if p.grad is made otherwise, "
                "use noise='off', or NoiseConfig(gradients='local') to have the optimizer average "
                "it; an update may have been made with it already"
            )


def starting_facts(groups: Sequence[Sequence[Tensor]], ranks: Ranks) -> dict[str, object]:
    """What every rank's parameters must have in common at the start, by name."""
    shapes = [[(tuple(p.shape), p.dtype) for p in params] for params in groups]
    facts: dict[str, object] = {
        "number of parameters, of which every rank must hold all, or FSDP2's shards": [
            len(params) for params in groups
        ],
        "digest of the parameters' shapes and types": digest(shapes),
    }
    if ranks.all > 1 and not ranks.sharded:
        all_params = [[p.detach() for params in groups for p in params]]
        facts["squared norm of the parameters"] = squared_norms(
            all_params, device_of(groups)
        ).item()
    return facts


def _divide(row: Row, where: slice, by: int) -> None:
    if isinstance(row, Tensor):
        row[where] /= by
    else:
        row[where] = [number / by for number in row[where]]
