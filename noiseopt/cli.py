"""The command line: `noiseopt demo`, `report`, `replay` and `watch`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import noiseopt
from noiseopt.demo import prepare
from noiseopt.demo.train import Settings
from noiseopt.report import read_run, record_of, report, show
from noiseopt.report.comparison import compare
from noiseopt.report.replaying import COLUMNS, parse_changes, rows, words
from noiseopt.watch import watch

DEMO = """\
Trains a small byte-level GPT on the source of Python's standard library twice, from the same
weights on the same micro-batches: with torch.optim.AdamW, and with NoiseAwareAdamW in its place.
Needs no network and no accelerator. Ctrl-C leaves what was done readable."""
REPORT = """\
Prints what the record of a run says (updates, noise with its interval, every change and its
reason, a verdict) and writes a page with interactive curves, report.html, which opens from the disk
and needs no network; beside it plot.png, the same as a picture, and decisions.csv, a row for each
decision. Several runs are laid side by side on one page."""

REPLAY = """\
Decides a recorded run again from its measurements and learning rates, and shows that the same
decisions come out; with --set, where other settings would have decided otherwise. Exits with 1 if
the same does not come out by the run's own settings."""
WATCH = """\
Shows a run in the terminal while it is trained: its noise, window, learning rate, clipping and
latest changes, from its record. Ctrl-C ends it; training is not touched. Into a file or a pipe it
shows what is known by now, and ends."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 is success, 1 an error that is named on standard error, 2 a wrong call, 130 an interruption.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="noiseopt",
        description="Torch optimizers that measure gradient noise and act on it.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {noiseopt.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_report(commands)
    _add_replay(commands)
    _add_watch(commands)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small model with and without noiseopt and show the difference",
        description=DEMO,
    )
    standard = Settings()
    options = (
        ("--steps", _positive, standard.steps, "N", "micro-batches for each optimizer"),
        ("--batch-size", _positive, standard.batch_size, "B", "excerpts in a micro-batch"),
        ("--lr", float, standard.lr, "LR", "peak learning rate"),
        ("--seed", int, standard.seed, "S", "of the weights and of the order of the data"),
        ("--name", str, "demo", "NAME", "name of the run, and of its folder"),
        ("--out", Path, Path("runs"), "DIR", "folder of all runs"),
    )
    for name, kind, default, placeholder, text in options:
        demo.add_argument(
            name, type=kind, default=default, metavar=placeholder, help=f"{text} (%(default)s)"
        )
    demo.add_argument(
        "--force", action="store_true", help="replace an earlier run of this name, not NAME-2"
    )
    demo.add_argument("--no-wandb", action="store_true", help="no wandb, even where installed")
    demo.set_defaults(run=_demo)


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report", help="print and draw what the record of a run says", description=REPORT
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="RUN", help="a run's folder, or its record"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PAGE",
        help="where the page goes (report.html in the first run's folder)",
    )
    parser.set_defaults(run=_report)


def _add_replay(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "replay",
        help="decide a recorded run again, by its own or other settings",
        description=REPLAY,
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, or its record")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of NoiseConfig to change, such as max_accumulation_steps=16; any number",
    )
    parser.set_defaults(run=_replay)


def _add_watch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "watch", help="follow a live run in the terminal", description=WATCH
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, or its record")
    parser.add_argument(
        "--every",
        type=_seconds,
        default=1.0,
        metavar="S",
        help="seconds between looks (%(default)s)",
    )
    parser.add_argument("--once", action="store_true", help="show what is known by now, and end")
    parser.set_defaults(run=_watch)


def _demo(arguments: argparse.Namespace) -> int:
    chosen = {name: getattr(arguments, name) for name in ("steps", "seed", "batch_size", "lr")}
    try:
        demo = prepare(
            Settings(**chosen),
            out=arguments.out,
            name=arguments.name,
            force=arguments.force,
            track=not arguments.no_wandb,
        )
    except (OSError, ValueError, ModuleNotFoundError) as error:
        return _fail(str(error))
    return demo.run()


def _report(arguments: argparse.Namespace) -> int:
    try:
        written = report(arguments.folders, arguments.out)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        return _fail(str(error))
    print("Written:", *written, sep="\n  ")
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    try:
        changes = parse_changes(arguments.set)
        found = compare(read_run(arguments.folder), changes)
    except (OSError, ValueError, TypeError) as error:
        return _fail(str(error))
    lines = rows(found) if changes else []
    if lines:
        show(f"With {', '.join(arguments.set)}", COLUMNS, lines)
    for line in words(found, changes):
        print(line)
    return 0 if changes or not found.differ else 1


def _watch(arguments: argparse.Namespace) -> int:
    try:
        watch(record_of(arguments.folder), arguments.every, arguments.once)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        pass  # this is how it ends
    return 0


def _fail(message: str, code: int = 1) -> int:
    print(f"noiseopt: {message}", file=sys.stderr)
    return code


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number
