"""Train BLeNet on Fashion-MNIST with JAX, on all CPUs, GPUs or TPUs there are.

    python train_jax.py                             the full data set, 10 epochs
    python train_jax.py --data sample --epochs 2    a quick look, no download
    python train_jax.py --data-dir ~/kmnist         any files named like MNIST's
    python train_jax.py --devices 4 --batch-size 512 --out runs/four
    python train_jax.py --config runs/four/config.toml --seed 1

It leaves a run folder. `python -m torch_bn.training` is the same in PyTorch.
"""

from __future__ import annotations

from bn_common.command_line import Program, as_command, main, program_name
from bn_common.config import Config

SCRIPT = "blenet-train"
"""The console script that an installation makes of this file."""


def _load(config: Config) -> Program:
    # Only now: a mistake on the command line is answered before JAX is imported.
    from bn_common.memory import keep_memory
    from jax_bn.mesh import make_mesh
    from jax_bn.predict import of_run
    from jax_bn.processes import again, join, leave
    from jax_bn.settings import (
        be_deterministic,
        check_what_is_kept,
        compute_in_the_caller,
        find_devices,
        keep_compiled,
        say_errors_once,
    )
    from jax_bn.training import train

    export = None
    if config.export is not None:
        from jax_bn import export as files

        files.check_installed()
        export = files.exported
    if config.deterministic:
        be_deterministic()
    keep_memory()
    compute_in_the_caller()
    keep_compiled()
    check_what_is_kept()
    say_errors_once()
    process, watch = join(config, _prog())
    find_devices()
    make_mesh(config)  # which refuses what the devices cannot do

    return Program(train, process, watch, leave, export, of_run, again(as_command(_prog())))


def _prog() -> str:
    return program_name(SCRIPT, "train_jax.py")


def run() -> None:
    """The program."""
    description = __doc__ or ""
    if _prog() == SCRIPT:
        description = description.replace("python train_jax.py", SCRIPT)
    main(_load, framework="jax", prog=_prog(), description=description)


if __name__ == "__main__":
    run()
