"""The bridge from the command line.

    python -m parity check                                     this project's own two wings, everything
    python -m parity check nets.torch:net nets.flax:net --shape 8,3,32,32 --html report.html
    python -m parity trace nets.torch:net nets.flax:net --inputs batch.npz --eval
    python -m parity dump nets.torch:net --inputs batch.npz --out a            where there is only PyTorch
    python -m parity dump nets.flax:net --inputs batch.npz --out b --weights a    where there is only JAX
    python -m parity compare a b                               anywhere
    python -m parity convert --help                            weights from one framework to the other
    python -m parity train --help                              both sides trained in lockstep
    python -m parity initialisation nets.torch:Net nets.flax:Net --shape 8,3,32,32    what new networks begin with

Exit status: 0 if they agree, 1 if anything differs, 2 if it could not be compared: a mistake on the command line (one
line says what was given and what is allowed), or an error in a module (the report says where). 130 if it was
interrupted.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from bn_common.command_line import parse, program_name, refuse
from bn_common.installed import BOTH, missing, need, needed_by

COMMANDS = "check", "convert", "trace", "train", "dump", "compare", "initialisation"
OF_BOTH = "check", "convert", "trace", "train", "initialisation"
INTERRUPTED = 130
"""As shells have it: 128 and the number of SIGINT."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit status.

    Raises:
      SystemExit: a mistake on the command line (2), or --help (0).
    """
    given, own = list(sys.argv[1:] if args is None else args), program_name("parity", "python -m parity")
    if given[:1] in (["-h"], ["--help"]):
        print((__doc__ or "").strip().replace("python -m parity", own))
        return 0
    command, rest = given[0] if given else "", given[1:]
    prog = f"{own} {command}"
    if command not in COMMANDS:
        refuse(own, f"command is {command!r}; allowed: {', '.join(COMMANDS)}, or --help")
    try:
        is_help = bool({"-h", "--help"} & {*rest})
        if command in OF_BOTH and not is_help:
            need(command, *BOTH)
        if command == "train":
            with _absent("torch") if is_help else contextlib.nullcontext():
                return int(importlib.import_module("parity.cli.train").main(rest) or 0)
        if command == "check" and not is_help and not any(":" in part for part in rest):
            return int(importlib.import_module("parity.wings.matrix").main(rest) or 0)
        with needed_by(command):
            return _run(command, rest, prog)
    except (ValueError, TypeError) as error:
        if "allowed:" not in str(error):
            return _failed()
        refuse(prog, str(error))
    except OSError as error:
        refuse(prog, str(error))
    except ModuleNotFoundError as error:
        if missing(error) is None:
            return _failed()
        refuse(prog, str(error))
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        return INTERRUPTED
    except Exception:  # a mistake of the bridge's own; exit status 1 would say that two sides differ
        return _failed()


def _run(command: str, rest: Sequence[str], prog: str) -> int:
    from parity.cli import commands
    from parity.cli.named_objects import exits_told

    kind: Any = getattr(commands, command.capitalize())
    with _absent("torch"):
        options = parse(kind, rest, prog=prog, description=kind.__doc__ or "")
    with exits_told():
        return options.run()


@contextlib.contextmanager
def _absent(name: str) -> Iterator[None]:
    """Where a module is kept from being imported by a None in its place, tyro would take it for imported."""
    is_blocked = sys.modules.get(name, sys) is None
    if is_blocked:
        del sys.modules[name]
    try:
        yield
    finally:
        if is_blocked:
            sys.modules[name] = None  # type: ignore[assignment]  # which is how it is blocked


def _failed() -> int:
    traceback.print_exc()
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
