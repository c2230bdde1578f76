"""LoRA fine-tuning of a decoder on any devices: a GPU, a TPU slice of many hosts, GPU nodes under SLURM.

    python tpu/finetune_lora.py --model Qwen/Qwen3-8B --data pairs.jsonl --text prompt --target answer --output runs/qwen
    python tpu/finetune_lora.py --model meta-llama/Llama-3.1-8B ... --mesh data=2,fsdp=8 --batch-size 32 rank=16 alpha=32

The flags are those of `jpeft train`, with other defaults: the weights split over all devices, layers scanned and recomputed, bfloat16.
Start one process on every host (tpu/launch.sh, tpu/gke.sh) or for every GPU (tpu/slurm.sbatch); the processes find each other. On other
clusters, give --coordinator, --num-processes and --process-id. The program prints what each device will hold, trains, and prints the
metrics. After a crash or a preemption, --resume continues from the last checkpoint, also on another number of devices.
"""

import dataclasses
import os
import sys
from typing import Literal

import jax
import tyro
from plan import Args as PlanArgs
from plan import main as print_plan

from jpeft import distributed
from jpeft.training.config import TaskName, TrainConfig, check_values
from jpeft.training.devices import find_mesh
from jpeft.training.interrupt import InterruptedRun
from jpeft.training.run_folder import RunFolder
from jpeft.training.train import train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(TrainConfig):
    """Fine-tune a decoder with LoRA on all devices of all processes."""

    model: str = "Qwen/Qwen3-8B"
    task: TaskName = "generation"
    # Tokens per pair. Longer pairs are cut; plain texts are joined and cut into rows of this length.
    max_length: int = 1024
    # Examples per optimizer step, over all devices; a multiple of data * fsdp.
    batch_size: int = 32
    epochs: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Recompute activations in the backward pass; "dots" keeps matrix products, which is faster and takes several times the memory.
    remat: bool | Literal["dots"] = True
    scan: bool = True
    mesh: str | None = "fsdp=-1"
    checkpoint_every: int = 50

    # Address HOST:PORT of the first process, if neither Cloud TPU nor SLURM provides it.
    coordinator: str | None = None
    # Number of processes, if neither Cloud TPU nor SLURM provides it.
    num_processes: int | None = None
    # Number of this process, from 0, if neither Cloud TPU nor SLURM provides it.
    process_id: int | None = None


def main(args: Args) -> int:
    """Train; return 0, or 128 + signal if the run was interrupted and saved."""
    distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    config = TrainConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig)})
    check_values(config)
    if config.task != "generation":
        raise ValueError(f"task {config.task!r}: this script fine-tunes decoders; `jpeft train` does the others, with --mesh as well")
    say = print if distributed.is_first() else lambda *_, **__: None
    if config.resume and distributed.on_first_process(RunFolder(config.output).result.exists):
        # Checked before the model is loaded, for which a single host may have too little memory.
        say(f"the run in {config.output} is finished")
        return 0
    mesh = find_mesh(config)
    say(f"{jax.process_count()} processes, {jax.device_count()} devices ({jax.devices()[0].device_kind})\n")
    distributed.on_first_process(lambda: _print_plan(config, mesh))
    try:
        result = train(config)
    except InterruptedRun as stop:
        say(f"{stop}; the same command with --resume continues from there", file=sys.stderr)
        return 128 + stop.signum
    for split in ("validation", "test"):
        if metrics := getattr(result, split):
            say(f"{split}: {', '.join(f'{name} {value:.4f}' for name, value in metrics.items())}")
    say(f"{result.trained:,} trained parameters, {result.steps} steps in {result.seconds:.1f} s; saved in {result.path}")
    return 0


def _print_plan(config: TrainConfig, mesh: jax.sharding.Mesh | None) -> None:
    """Print what each device will hold, or why this is unknown; training continues in both cases."""
    args = PlanArgs(
        config=config.model,
        devices=1 if mesh is None else mesh.size,
        mesh="data=1" if mesh is None else ",".join(f"{name}={size}" for name, size in mesh.shape.items()),
        method=config.method,
        options=config.options,
        batch=config.batch_size // config.grad_accum,
        length=config.max_length,
        dtype=config.dtype or "bfloat16",
        weights="float32",
        memory=_memory() / 2**30,
    )
    try:
        print_plan(args)
    except ValueError as error:  # a method that needs statistics or words cannot be planned without them
        print(f"no plan: {error}\n")


def _memory() -> int:
    """Return the bytes of memory of a device, or of the host if devices do not report their memory (a CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))))
    except ValueError as error:
        sys.exit(f"error: {error}")
