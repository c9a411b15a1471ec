"""What the training loop does with an engine: whether each micro-batch shows, and what is in vain.

Mistakes that DeepSpeed passes over in silence are raised or warned of here, each warning once.
"""

import logging
from typing import Any

from noiseopt.integrations.deepspeed.control import EngineControl
from noiseopt.integrations.deepspeed.leaves import LeafNorms
from noiseopt.integrations.deepspeed.wrappers import Wrapper

KEEPS_LAST_ONLY = (1, 2)  # stages that lose all but the last of several backwards in one step
SUMS_ANEW = 3  # the stage whose zero_grad() has the next backward forget the window's earlier ones

logger = logging.getLogger("noiseopt")


class LoopWatch:
    """Looks at the loop's calls in a window.

    Args:
        engine: the engine.
        wrapper: of its optimizer.
        leaves: what its backwards have brought.
        control: knows who says where windows end.
    """

    def __init__(
        self, engine: Any, wrapper: Wrapper, leaves: LeafNorms, control: EngineControl
    ) -> None:
        self._engine, self._wrapper = engine, wrapper
        self._leaves, self._control = leaves, control
        self._told: set[str] = set()
        self.begin_window()

    def begin_window(self) -> None:
        """Count calls from here."""
        self._calls = 0  # of engine.step
        self.begin_again()

    def begin_again(self) -> None:
        """Take the open window to have had no backward yet."""
        self._stepped = 0  # backward passes before the last of them, which left their gradients
        self._held = 0  # parameters with a gradient then
        self._brought = 0  # those after the last backward
        self._marks = self._leaves.marks()  # and theirs
        self._lost = False  # whether one of those went
        self._edited = False  # whether one was changed between a backward and what came next
        self._cleared = False  # whether a sum that is kept elsewhere is begun anew
        self._left_over = False  # whether there were gradients before its first backward
        self._thrown = False  # whether all of them were thrown away since the last backward

    def begin_step(self) -> None:
        """Count a call of `engine.step`, which is to come."""
        self._calls += 1
        self._thrown = False  # of what was reduced in the backward the step may make an update
        self._stepped, self._held = len(self._leaves), self._leaves.held()
        self._see_edits()
        self._lost |= self._leaves.spent and self._cleared
        if not self._control.loop_ends_windows:  # which may have them reduced before
            self._lost |= self._held < self._brought

    def begin_backward(self) -> None:
        """See whether what the window's last step left is still there, or its last backward.

        That is where no step comes before the window's end.
        """
        left = self._brought if self._control.loop_ends_windows else self._held
        self._lost |= self._cleared or (left > 0 and self._leaves.held() < left)
        self._left_over |= len(self._leaves) == 0 and self._leaves.holds_any()
        self._see_edits()

    def end_backward(self) -> None:
        """See what it has left for the step to come."""
        self._thrown = False
        self._brought = self._leaves.held()
        self.end_reduction()

    def end_reduction(self) -> None:
        """Take gradients as they are for DeepSpeed's own work."""
        self._marks = self._leaves.marks()

    def see_setter(self) -> None:
        """See that the loop sets a gradient."""
        self._edited |= len(self._leaves) > 0

    def see_clearing(self, by_optimizer: bool) -> None:
        """See that gradients are cleared: by the optimizer those that it keeps elsewhere, too."""
        if len(self._leaves) == 0:
            return
        anew = self._leaves.spent or int(self._engine.zero_optimization_stage()) == SUMS_ANEW
        self._cleared |= anew and by_optimizer
        steps = self._engine.gradient_accumulation_steps()
        own = self._control.loop_ends_windows
        self._thrown |= not own and self._wrapper.throws_away(by_optimizer, steps)

    @property
    def threw_away(self) -> bool:
        """Whether the loop has thrown away all gradients of the open window, none by a step."""
        return self._thrown and self._leaves.held() == 0

    @property
    def begins_again(self) -> bool:
        """Whether a backward now is the window's first, as those before it were thrown away."""
        return self.threw_away and self._stepped == 0

    def _see_edits(self) -> None:
        self._edited |= len(self._leaves) > 0 and self._marks != self._leaves.marks()

    def begin_update(self) -> None:
        """Let gradients go, as the engine's update has it."""
        self._stepped = self._held = self._brought = 0

    def check_passes(self, passes: int) -> None:
        """Refuse a window of which DeepSpeed has lost a part.

        Raises:
            RuntimeError: there were more backward passes than calls of `engine.step`.
        """
        stage = int(self._engine.zero_optimization_stage())
        if self._control.loop_ends_windows or stage not in KEEPS_LAST_ONLY:
            return
        if passes > self._engine.gradient_accumulation_steps():
            raise RuntimeError(
                f"{passes} backward passes in {self._calls} calls of engine.step(): at ZeRO stage "
                f"{stage} DeepSpeed keeps only the last gradient of a step; call engine.step() "
                "after each engine.backward(), or use coalesce_grad_reduction()"
            )

    def keeps_gradients(self) -> bool:
        """Whether gradients are to stay, since an open window's update is to take them; tells so.

        A gradient whose step has not come yet is the loop's, which may throw it away.
        """
        holds = 0 < self._stepped == len(self._leaves)
        if self._control.loop_ends_windows or not holds:
            return False
        self._tell_here(
            "zero_grad",
            "zero_grad() inside a window is passed over, since it would throw away the window's "
            "earlier micro-batches: leave it out, DeepSpeed clears gradients after each update; "
            "where another loss leaves gradients here, as a GAN's does, freeze this model in it",
        )
        return True

    def shows_each(self, passes: int) -> bool:
        """Whether each micro-batch was read, in one backward of its own; tells why not."""
        if self._lost:
            self._tell_here(
                "lost",
                "gradients were thrown away inside a window, as by param.grad = None: its update "
                "lacks its earlier micro-batches, and such windows are not measured; leave it out, "
                "DeepSpeed clears gradients after each update",
            )
            return False
        if self._leaves.strays:
            self._tell_here(
                "strays",
                "a backward ran outside of engine.backward(loss): windows with one are not "
                "measured; call engine.backward",
            )
            return False
        if self._leaves.unread:
            self._tell_here(
                "unread",
                "a parameter's gradient came in parts or unread, as where it is used inside and "
                "outside of a reentrant checkpoint: windows with one are not measured; use "
                "checkpoint(use_reentrant=False), and a newer torch",
            )
            return False
        if self._left_over:
            self._tell_here(
                "left over",
                "there were gradients before a window's first engine.backward(), as of one that "
                "raised: its update has them too, and such windows are not measured; call "
                "engine.zero_grad() after a backward that raised",
            )
            return False
        if not self._control.loop_ends_windows and passes != self._calls:
            self._tell_here(
                "passes",
                f"{passes} backward passes in {self._calls} calls of engine.step(): such windows "
                "are not measured; call engine.backward once before each engine.step, with the sum "
                "of losses if there are several",
            )
            return False
        if self._edited or self._leaves.edited:
            self._tell_here(
                "edited",
                "gradients were edited between engine.backward() and engine.step(), as by "
                "clip_grad_norm_ (also at inf, for the norm), or in a hook of "
                "register_post_accumulate_grad_hook(): such windows are not measured; to "
                "clip, set gradient_clipping in the config, which DeepSpeed does itself; to read a "
                "norm, call engine.get_global_grad_norm(); and change gradients in a parameter's "
                "register_hook()",
            )
            return False
        return True

    def tell(self, of: str, text: str) -> None:
        """Warn, once of each thing, of what is so on all ranks: on one of them."""
        if self._engine.global_rank == 0:
            self._warn_once(of, text)

    def _tell_here(self, of: str, text: str) -> None:
        """Warn, once of each thing, of what this rank's loop does: others' may not."""
        self._warn_once(of, f"rank {self._engine.global_rank}: {text}")

    def _warn_once(self, of: str, text: str) -> None:
        if of not in self._told:
            self._told.add(of)
            logger.warning("%s", text)
