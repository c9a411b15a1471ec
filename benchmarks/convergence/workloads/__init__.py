"""The workloads: real data that needs no download, a model, and how long it is trained.

The tuning and the reporting split have other held-out data, and where there is enough of it, other
training data too. Held-out data is the same for all arms and seeds of a split.
"""

from benchmarks.convergence.workloads import autoencoder, digits, gpt
from benchmarks.convergence.workloads.base import BETA1, SPLITS, Batch, Data, Workload

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        gpt.SMALL,
        gpt.LONG,
        gpt.SHIFT,
        digits.DIGITS,
        autoencoder.PHOTOGRAPHS,
        gpt.LARGE,
    )
}
MAIN = ("digits", "autoencoder", "gpt")  # what a plain `run` trains, the quickest first

__all__ = ["BETA1", "MAIN", "SPLITS", "WORKLOADS", "Batch", "Data", "Workload"]
