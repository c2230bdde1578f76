"""What a run begins with, in a few lines: devices, rows, steps, rates, and what is trained."""

import jax

from jpeft.core.summary import summary
from jpeft.training.prepare import Setup


def opening(setup: Setup, remat: str) -> str:
    """Return the block that is shown before the first step, a line for each thing.

    Args:
      setup: The run.
      remat: How activations are recomputed, and why; empty if there was nothing to choose by.
    """
    lines = {
        "method": " ".join([setup.config.method, *setup.config.options])
        + (f", from {adapter}" if (adapter := setup.config.adapter) else ""),
        "device": _device(setup),
        "rows": ", ".join(f"{name} {len(next(iter(arrays.values()))):,}" for name, arrays in setup.splits.items()),
        "steps": _steps(setup),
        "rate": _rate(setup),
        "trained": _trained(setup),
    }
    if remat:
        lines["remat"] = remat
    if setup.labels:
        names = ", ".join(setup.labels[:8]) + (f", ... ({len(setup.labels)} in all)" if len(setup.labels) > 8 else "")
        lines["labels"] = f"{names}; the head for them is {_whose_head(setup)}"
    return "\n".join(f"{name:<8} {text}" for name, text in lines.items())


def _method(setup: Setup) -> str:
    begun = f", from {setup.config.adapter}" if setup.config.adapter is not None else ""
    return " ".join([setup.config.method, *setup.config.options]) + begun


def _whose_head(setup: Setup) -> str:
    if setup.new:
        return "new"
    return "of the checkpoint" if setup.config.adapter is None else "of the adapter, or of the checkpoint"


def _device(setup: Setup) -> str:
    mesh = setup.devices.mesh
    if mesh is None:
        device = jax.devices()[0]
        return f"{device.platform}, {device.device_kind}" if device.device_kind != device.platform else device.platform
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{mesh.size} of {mesh.devices.flat[0].device_kind}, {sizes}"


def _steps(setup: Setup) -> str:
    config, epochs = setup.config, setup.steps / setup.steps_per_epoch
    accumulated = f" in {config.grad_accum} parts" if config.grad_accum > 1 else ""
    stages = f"; in {len(setup.segments)} stages" if len(setup.segments) > 1 else ""
    return f"{setup.steps:,} ({epochs:.3g} epochs), each of {config.batch_size} x {config.max_length} tokens{accumulated}{stages}"


def _rate(setup: Setup) -> str:
    config, own = setup.config, " (the method's default)" if setup.config.learning_rate is None else ""
    head = f", {setup.head_learning_rate:g} for the new head" if setup.new else ""
    return f"{setup.learning_rate:g}{own}{head}; {config.schedule}, with {100 * config.warmup:g} % warmup"


def _trained(setup: Setup) -> str:
    counts = summary(setup.peft)
    return f"{counts.trained:,} parameters, {100 * counts.trained / counts.base:.3g} % of {counts.base:,}"
