"""What a decision rests on and what it says: the two ends of the controller."""

from dataclasses import dataclass

from noiseopt.control.costs import Costs
from noiseopt.control.rates import Rates
from noiseopt.control.verification import Judgement
from noiseopt.estimate import NoiseEstimate, WindowNorms

ACTIONS = ("hold", "grow", "shrink", "revert")


@dataclass(frozen=True, slots=True)
class Window:
    """What one window brought. Feeding the same windows again gives the same decisions.

    Attributes:
        norms: the squared norms of its gradients; None if no gradient in it was finite.
        micro_batches: micro-batches in it on one rank, the skipped ones included.
        skipped: those of them left out because their gradient was not finite; the mean over the
            ranks, rounded up.
        applied: whether it ended in an update.
        clipped: whether that update's gradient was clipped.
        loss_sum: sum of the reported losses, each a mean over one micro-batch.
        loss_count: how many losses were reported.
        ranks: how many took part, each with its own micro-batches.
    """

    norms: WindowNorms | None
    micro_batches: int
    skipped: int = 0
    applied: bool = True
    clipped: bool = False
    loss_sum: float = 0.0
    loss_count: int = 0
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Decision:
    """One record: what was measured, what was changed or held, and why.

    Attributes:
        num_windows: windows closed so far, with or without an update.
        num_updates: updates applied so far.
        reference_updates: updates that the same micro-batches make in windows of the reference
            length, the one for which the user's rates were chosen.
        samples_seen: samples seen so far, or what else `unit` says.
        tokens_seen: tokens seen so far; None if the config does not tell how many samples hold.
        unit: what is counted: "samples", or "micro-batches" if their size was not told.
        action: "hold", "grow", "shrink" or "revert".
        reason: why, in words and numbers.
        applied: whether it takes effect; False in mode "advise".
        phase: "warm-up", "stable" or "decay", by the user's learning rate.
        accumulation_steps: the window decided on, in micro-batches on each rank.
        batch: samples in such a window on all ranks.
        rates: the factors on the user's hyper-parameters that go with it.
        max_norm: the clipping threshold at this batch; infinite for none.
        verifying: the change that is being verified against the loss; None if none is.
        noise: the estimate; None while it is unknown.
        lr: the user's learning rate, the adapted factor not included.
        loss: the mean reported loss since the last decision; None if none was.
        grad_norm: the last window's gradient norm before clipping; None if it was skipped, or
            is not known, as of a window shorter than announced that the loop accumulated itself.
        clip_coefficient: the least factor that clipping put on a gradient since the last decision;
            1 for none.
        total_clipped: updates clipped so far.
        total_skipped: micro-batches skipped so far.
        total_dropped: micro-batches of open windows that checkpoints left behind.
        ranks: how many ranks take part.
        windows: what was measured since the last decision, for replay.
        seconds: the time between the two decisions before, mean over the ranks; None if it was not
            measured, as where the objective is not time.
        costs: of an update and a micro-batch in time; None while they are not known.
    """

    num_windows: int
    num_updates: int
    reference_updates: float
    samples_seen: float
    tokens_seen: float | None
    unit: str
    action: str
    reason: str
    applied: bool
    phase: str
    accumulation_steps: int
    batch: float
    rates: Rates
    max_norm: float
    verifying: Judgement | None
    noise: NoiseEstimate | None
    lr: float
    loss: float | None
    grad_norm: float | None
    clip_coefficient: float
    total_clipped: int
    total_skipped: int
    total_dropped: int = 0
    ranks: int = 1
    windows: tuple[Window, ...] = ()
    seconds: float | None = None
    costs: Costs | None = None
