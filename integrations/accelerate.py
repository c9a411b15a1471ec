"""Accelerate with a DeepSpeed config: its windows made as long as the engine decides.

    deepspeed.enable()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config="ds_config.json"))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    follow_windows(accelerator)

Without it Accelerate keeps the windows of its own settings: clipping adapts, and the rates only in
a shorter window at the end of an epoch.
"""

import logging
from typing import Any

logger = logging.getLogger("noiseopt")


def follow_windows(accelerator: Any) -> None:
    """Have `accelerator.accumulate` end each window where the engine's decisions say.

    Call it after `prepare`. The last window of an epoch ends with the data, as it does without.

    Args:
        accelerator: the `Accelerator`.

    Raises:
        ValueError: it has no noise-aware DeepSpeed engine.
        RuntimeError: it has ended windows already.
    """
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    noise = getattr(getattr(wrapped, "engine", None), "noise_aware", None)
    if noise is None:
        raise ValueError(
            "the accelerator has no noise-aware engine: call "
            "noiseopt.integrations.deepspeed.enable() and accelerator.prepare(...) before, with a "
            'DeepSpeed config that has the section "noise_aware"'
        )

    stretched = any(
        type(each).__name__ == "AcceleratedScheduler" for each in accelerator._schedulers
    )
    if stretched and accelerator.is_main_process:
        logger.warning(
            "the learning rate's scheduler was given to accelerator.prepare(), which advances it "
            "once for each update: it stretches as windows grow; name it in the DeepSpeed config, "
            "where it follows the samples"
        )

    def set_window(steps: int) -> None:
        accelerator.gradient_accumulation_steps = steps
        accelerator.step = 0  # it ends windows where this is a multiple of their length

    noise.lead(set_window)
