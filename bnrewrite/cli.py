"""The command `bnrewrite explain|export|verify|bench MODEL --input 1x3x224x224`.

MODEL is MODULE:CALLABLE, a function or class that makes the model when it is called, or a `.pt` or
`.pt2` file. Results go to the standard output, progress and errors to the other one.

Exit codes:
    0   done; for `verify`, both compute the same
    1   `verify`: they do not
    2   the command line is wrong
    3   the model does not load, does not run on the inputs, or cannot be exported
    130 interrupted; 143 told to end
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from bnrewrite.commands import COMMANDS, Failure
from bnrewrite.errors import with_its_name
from bnrewrite.subject import parsed_input

DONE, DIFFERENT, WRONG_USAGE, FAILED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143
_EPILOGUE = "exit codes: " + "; ".join(
    (
        "0 done (verify: both compute the same)",
        "1 verify: they do not",
        "2 the command line is wrong",
        "3 the model does not load, run or export",
        "130 interrupted",
        "143 told to end",
    )
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: without the name of the command; those of the process where None.
    """
    try:
        given = _parser().parse_args(arguments)
    except SystemExit as done:  # argparse has printed its message
        return int(done.code or 0)
    errors = Console(stderr=True, highlight=False)
    try:
        with _ended_in_order():
            return DONE if COMMANDS[given.command](given, errors) else DIFFERENT
    except KeyboardInterrupt:
        errors.print("interrupted", markup=False)
        return INTERRUPTED
    except Failure as failure:
        _tell(errors, str(failure))
        return WRONG_USAGE if failure.is_usage else FAILED
    except Exception as error:  # of the user's model, or of a file
        if given.traceback:
            traceback.print_exc()
        _tell(errors, with_its_name(error))
        return FAILED


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """A process that is told to end removes what it has half written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(errors: Console, message: str) -> None:
    errors.print(f"bnrewrite: {message}", markup=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bnrewrite",
        description="Finds hand-written norms in a model, and gives them native speed.",
        epilog=_EPILOGUE,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    explain = _command(commands, "explain", "show what is found in a model and what becomes of it")
    explain.add_argument("--html", metavar="FILE", help="write the report as a page, too")
    export = _command(commands, "export", "write a model as ONNX, its norms as single operators")
    export.add_argument("--output", "-o", required=True, metavar="FILE", help="the .onnx file")
    export.add_argument("--opset", type=int, default=23)
    export.add_argument("--target", choices=("cuda", "cpu", "tensorrt"), default="cuda")
    export.add_argument(
        "--dynamic",
        metavar="DIMS",
        default="",
        help="dimensions of every input that may change, such as 0,2,3",
    )
    export.add_argument("--no-verify", action="store_true", help="do not run the written file")
    verify = _command(commands, "verify", "compare an optimised model with the user's in float64")
    verify.add_argument("--steps", type=int, default=3, help="forwards and backwards (3)")
    bench = _command(commands, "bench", "time a model, and count what it saves for the backward")
    bench.add_argument("--rounds", type=int, default=15, help="samples of each, at least 2 (15)")
    for each in (verify, bench):
        each.add_argument("--backend", default="auto", help="what runs the optimised model (auto)")
    return parser


def _command(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    """A command with the arguments that all of them have."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=_EPILOGUE
    )
    parser.add_argument("model", metavar="MODEL", help="MODULE:CALLABLE, or a .pt or .pt2 file")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        type=parsed_input,
        metavar="SHAPE[:DTYPE]",
        help="an input, 1x3x224x224 or 8x128:int64, in order; =0.5 for a number",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--train", action="store_true", help="put the model into training mode")
    mode.add_argument("--eval", action="store_true", help="put the model into evaluation mode")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser
