"""DeepSpeed's own Adam kernels, fused and on the CPU, which compile for minutes when first used.

Left out by default: make test ARGS='-m compiled'.
"""

import functools

import pytest
import torch

from tests.distributed import test_deepspeed as torchs
from tests.distributed.ranks import result, run_on_ranks

pytestmark = [pytest.mark.compiled, pytest.mark.distributed]

FUSED = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}}}
FASTER = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}}
ON_CPU = {"zero_optimization": {"offload_optimizer": torchs.TO_CPU}}
KERNELS = {f"FusedAdam at stage {stage}": {"stage": stage} | FUSED for stage in torchs.STAGES}
KERNELS |= {f"CPUAdam at stage {stage}": {"stage": stage} | ON_CPU for stage in (1, 2, 3)}
CASES = {
    **{name: functools.partial(torchs.measured_run, **case) for name, case in KERNELS.items()},
    "torch, adaptive": functools.partial(torchs.adaptive_run, stage=0),
    "FusedAdam, adaptive": functools.partial(torchs.adaptive_run, stage=2, **FASTER),
    "CPUAdam, adaptive": functools.partial(torchs.adaptive_run, stage=3, **ON_CPU),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on_ranks(CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", KERNELS)
def test_norms_and_weights_are_those_of_plain_pytorch(ranks, name):
    one, other = result(ranks, name)
    norms, weights = torchs.oracle()
    torchs.assert_same(one, other)
    assert one["lengths"] == torchs.LENGTHS
    assert torchs.worst_norm(one["windows"], norms) < 1e-6
    torch.testing.assert_close(one["weights"], weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["FusedAdam, adaptive", "CPUAdam, adaptive"])
def test_rates_and_windows_adapt_as_with_torch(ranks, name):
    one, _ = result(ranks, name)
    wanted, _ = result(ranks, "torch, adaptive")
    assert one["lengths"] == wanted["lengths"]
    torch.testing.assert_close(one["weights"], wanted["weights"], rtol=0, atol=1e-5)
