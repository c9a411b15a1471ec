"""Does clipping hold back what is bad, and nothing else? Ours against the published rules.

    python -m benchmarks.clipping           # results/clipping.{json,md}; goes on where it stopped
    python -m benchmarks.clipping --table   # draws the table of clipping.json anew
    python -m benchmarks.clipping --quick   # a smoke test, writes nothing unless --output is given

Every arm is AdamW with the same rate, micro-batches and windows: 1, 2, 4, 2 and 1 micro-batches, so
that the batch doubles and halves in mid-run. Only clipping differs. `rules` holds the rivals, from
their published formulas and with their published settings; `scenarios` what is done to the data.

An update is bad if something was injected into one of its micro-batches, and clean otherwise.

false clips: the share of clean updates whose gradient was made smaller. Not counted are the first
    100 updates, in which ours has not learned its level.
kept: what clipping left of the norm of clean gradients, on average (those updates left out too).
caught: the share of bad updates whose gradient was made smaller. Not told where nan was injected:
    ours leaves such a micro-batch out and applies the rest of its window.
spikes: updates after which the loss on fixed, clean, held-out samples is more than 50 % above its
    median after the 50 updates before. The median starts again where the domain switches.
worst: the largest such ratio.
non-finite: runs in which a parameter became nan or infinite; such a run ends there.
loss: at the end, on clean held-out samples of the domain that was trained last.
"""
