"""What each backward pass brings, read where it passes: on this rank, before anything is reduced.

A hook on each leaf reads the norm of the gradient that comes; the hook after accumulation confirms
it, since `torch.autograd.grad` brings gradients too, which are not accumulated. At the end of the
pass, after DDP and FSDP2 have finished their part, a callback may look at `p.grad`. No gradient is
kept.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction

from noiseopt.capture.edits import Edits
from noiseopt.capture.frames import runs_in
from noiseopt.capture.hooks import Hooks, stands_last, taking_hooks, weakly
from noiseopt.capture.norms import Begun, begun_norm, device_of, joined_norm, unknown_norms
from noiseopt.capture.sharding import Slot, is_sharded, settled, share_among, unsharded_leaves

_parts = share_among(1)  # into how many different ones a gradient is spread


class BackwardPasses:
    """Hooks on parameters, and the norms that they have read.

    Args:
        groups: the parameters of each group. Frozen ones are passed over.
        ended: called at the end of each pass.
        reads: tells whether the norms of the open window are wanted; if not, they are nan.
        skips: tells of passes whose gradients were thrown away whether that was for not being
            finite, as by a GradScaler that skips the step.

    Attributes:
        norms: |h|^2 of each pass since the last `clear`, shape (groups,).
        num_skipped: passes since then that were thrown away for not being finite.
        is_overtaken: whether hooks which others had added since the window opened came after ours
            in one of its passes, whose norms are then not known. Other ranks' may be.
        is_edited: whether hooks of others changed a gradient after it was accumulated in one of
            its passes, whose norms are then not known either.
        paused: whether gradients go by unread.
        watched: the parameters, each with its group.
        model_ranks: over how many ranks one rank's gradient is spread, as by tensor parallelism;
            `norms` are to be summed over them.

    A backward pass brings one gradient. Reentrant checkpointing runs others inside it, whose norms
    would not add where they share a parameter: it is refused.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        ended: Callable[[], object],
        reads: Callable[[], bool],
        skips: Callable[[], bool] = lambda: False,
    ) -> None:
        self._skips = skips
        self._ended = ended
        self._reads = reads
        self._num_groups = len(groups)
        self._device = device_of(groups)
        self._following, self._reading, self._edits = Hooks(), Hooks(), Edits()
        self._standing = self._reading.standing
        self._passing: dict[Tensor, tuple[Begun, float]] = {}
        self._starts_anew = False
        self._current: list[list[tuple[Begun, float]]] = []
        self._attached: dict[Tensor, Tensor] = {}  # leaves that are hooked, and whose they are
        self._unseen: list[Slot] = []  # FSDP2's parameters that are still to be hooked
        self._unread = False  # whether a gradient passed that was not hooked
        self._overtaken: int | None = None  # the pass in which one was not read last
        self._brought: set[Tensor] = set()
        self._stood = False  # whether the last pass left gradients of them in `p.grad`
        self._task = -1
        self.norms: list[Tensor] = []
        self.num_skipped = 0
        self.watched: dict[Tensor, int] = {}
        self.model_ranks = 1
        self.paused = self.is_overtaken = self.is_edited = False
        self._listens = True
        for index, params in enumerate(groups):
            self._watch_trained(params, index)

    def __len__(self) -> int:
        """How many backward passes there were since the last `clear`."""
        return len(self.norms)

    def add_group(self, params: Sequence[Tensor]) -> None:
        """Watch one more group."""
        self._watch_trained(params, self._num_groups)
        self._num_groups += 1
        self.norms = [torch.cat([norms, norms.new_zeros(1)]) for norms in self.norms]

    def clear(self) -> None:
        """Forget what was read."""
        self.norms, self._current, self.num_skipped = [], [], 0
        self._unread = self.is_overtaken = self.is_edited = False
        self._passing.clear()
        self._brought.clear()

    def skip(self, number: int) -> None:
        """Count so many passes, the oldest, as thrown away for not being finite."""
        self.num_skipped += number
        del self.norms[:number]

    def join(self, number: int) -> None:
        """Take all passes for so many micro-batches, whose norms are then unknown."""
        self.norms = [unknown_norms(self._num_groups, self._device)] * number

    def listen(self, wanted: bool) -> None:
        """Read gradients only while that is wanted."""
        self._listens = wanted
        if wanted:
            self.come_last()

    def come_last(self) -> None:
        """Read gradients as hooks that others have added leave them."""
        self._reading.come_last()

    def end_with(self, owner: object) -> None:
        """Remove the hooks when their reader is freed; inside a backward, too."""
        for hooks in self._hooks:
            hooks.end_with(owner)

    def detach(self) -> None:
        """Remove the hooks."""
        for hooks in self._hooks:
            hooks.remove()
        self.watched.clear()
        self._attached.clear()
        self._unseen.clear()

    @property
    def _hooks(self) -> Sequence[Hooks]:
        return self._reading, self._following, self._edits.hooks

    def watch_more(self, groups: Sequence[Sequence[Tensor]]) -> bool:
        """Watch parameters that have a gradient and were not watched, as those that were frozen.

        Returns:
            Whether there was any.
        """
        found = False
        for index, params in enumerate(groups):
            new = [p for p in params if p.grad is not None and p not in self.watched]
            self._watch(new, index)
            found |= bool(new)
        return found

    def _watch_trained(self, params: Sequence[Tensor], group: int) -> None:
        self._watch([param for param in params if param.requires_grad], group)

    def _watch(self, params: Sequence[Tensor], group: int) -> None:
        self.watched.update((param, group) for param in params)
        managed: set[Tensor] = set()
        for module, slots in unsharded_leaves(params):
            managed.update(slot.param for slot in slots)
            self._unseen += slots
            self._following.add(partial(_before_forward, module, self._follow(slots)))
        for param in params:
            if param not in managed:
                self._attach(param, param)

    def see_more(self) -> bool:
        """Hook what FSDP2 uses unhooked; whether there was any such since the last `clear`.

        No forward of its module shows a parameter that another method uses, registered by
        `register_fsdp_forward_method`: at first its gradient passes unread.
        """
        if self._see(self._unseen):
            self._unread = True
        return self._unread

    def _see(self, slots: Sequence[Slot]) -> bool:
        """Hook those of FSDP2's parameters that were made whole; whether some had a gradient."""
        if self._standing.ended:
            return False
        made = {leaf: slot.param for slot in slots if (leaf := slot.leaf) is not None}
        new = [leaf for leaf in made if leaf not in self._attached]
        for leaf in new:
            self._attach(leaf, made[leaf])
        if new:
            self._unseen = [slot for slot in self._unseen if slot.leaf not in self._attached]
        return any(leaf.requires_grad for leaf in new)

    def _follow(self, slots: list[Slot]) -> Callable[[nn.Module, Any], None]:
        @torch._disable_dynamo  # type: ignore[attr-defined]
        def before_forward(module: nn.Module, args: Any) -> None:
            self._see(slots)

        return before_forward

    def _attach(self, leaf: Tensor, param: Tensor) -> None:
        self._attached[leaf] = param
        hooked: Any = leaf
        if is_sharded(leaf):
            self.model_ranks = max(self.model_ranks, hooked.device_mesh.size())
        self._reading.add(partial(self._read, leaf, param))

    def _read(self, leaf: Tensor, param: Tensor) -> Sequence[Any]:
        hooked: Any = leaf

        def before(grad: Tensor) -> None:
            if not self._hears():
                return
            self._starts_anew = leaf is param and param.grad is None
            if self._reads():
                if not stands_last(reader):
                    self._overtaken = torch._C._current_graph_task_id()
                self._edits.watch(param)
                whole = settled(grad)  # which may be spread otherwise than the parameter
                self._passing[leaf] = begun_norm(whole), _parts(whole)

        with taking_hooks(leaf):
            reader = hooked.register_hook(before)
            return reader, hooked.register_post_accumulate_grad_hook(weakly(self._confirm))

    def _confirm(self, leaf: Tensor) -> None:
        if self._hears():
            self._take(leaf, self._attached[leaf])

    def _hears(self) -> bool:
        return self._listens and not self.paused and not self._standing.ended

    def _take(self, leaf: Tensor, param: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            # What a backward that failed half-way has left is dropped here.
            _refuse_nested_backward()
            self._task, self._current = task, [[] for _ in range(self._num_groups)]
            Variable._execution_engine.queue_callback(self._close)
            # What FSDP2 keeps for a later pass is none of what was thrown away.
            if self._starts_anew or (leaf is not param and self._stood and param.grad is None):
                self._forget_thrown_away(param)
        if self._reads():
            self._current[self.watched[param]].append(self._passing.pop(leaf))
        self._brought.add(param)

    def _forget_thrown_away(self, newest: Tensor) -> None:
        """Forget passes whose gradients were set to None since, as a GAN's other half has it."""
        if not self.norms or any(p.grad is not None for p in self._brought if p is not newest):
            return
        if self._skips():
            self.skip(len(self))
        self.is_overtaken = self.is_edited = False
        self.norms = []
        self._brought.clear()

    def _close(self) -> None:
        # Queued before the callbacks in which DDP and FSDP2 finish; one queued here runs after.
        Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        if self._standing.ended:
            return
        reads, overtaken, edited = self._reads(), self._overtaken == self._task, self._edits.found()
        self.is_overtaken |= overtaken
        self.is_edited |= edited
        if reads and not self.see_more() and not overtaken and not edited:
            self.norms.append(torch.stack([self._joined(norms) for norms in self._current]))
        else:
            self.norms.append(unknown_norms(self._num_groups, self._device))
        self._current = []
        self._stood = any(param.grad is not None for param in self._brought)
        self._ended()

    def _joined(self, norms: list[tuple[Begun, float]]) -> Tensor:
        if self.model_ranks == 1:
            return joined_norm([norm for norm, _ in norms], self._device)
        ranks = self.model_ranks
        parts = [joined_norm([norm], self._device) * (part / ranks) for norm, part in norms]
        return sum(parts, joined_norm([], self._device))


def _before_forward(module: nn.Module, hook: Callable[[nn.Module, Any], None]) -> Sequence[Any]:
    return (module.register_forward_pre_hook(hook),)


def _refuse_nested_backward() -> None:
    """Raise where this backward runs inside the backward of another, as checkpoints may have it."""
    if runs_in(BackwardCFunction.apply):
        raise RuntimeError(
            "a backward pass runs inside another, as with reentrant checkpointing, and brings a "
            "micro-batch's gradient in several parts: use checkpoint(use_reentrant=False), or, on "
            "one rank, accumulation='internal'"
        )
