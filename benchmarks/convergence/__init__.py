"""Fewer updates at the same loss? Ours against every rival on the same samples, models and seeds.

    python -m benchmarks.convergence run       # everything that is not cached; Ctrl-C loses one run
    python -m benchmarks.convergence status    # what is done, what is left
    python -m benchmarks.convergence table     # results/convergence.{json,md} and a figure for each

Every arm sees the same micro-batches in the same order and the same learning-rate schedule, counted
in micro-batches. An arm chooses windows: how many micro-batches make one update. At the end of the
data an open window is applied as it is, in all arms alike, so that all consume the same samples.
"""
