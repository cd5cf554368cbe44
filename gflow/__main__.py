"""The command line: ``gflow reproduce``, ``run``, ``sweep`` and ``check``."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import Executor

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0: every applicable claim holds; 1: one fails, or a run did not reach its goal; 2: the input
    is at fault.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return BAD_INPUT
    try:
        _cache_programs()
        return options.command(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if options.traceback:
            raise
        print(f"gflow: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("gflow: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--no-progress", action="store_true", help="no progress bars, also on a terminal"
    )
    shared.add_argument(
        "--traceback", action="store_true", help="show where in the program an error arose"
    )
    parser = argparse.ArgumentParser(
        prog="gflow", description="Exact gradient flow of deep linear networks."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and exit")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    reproduce = commands.add_parser(
        "reproduce",
        parents=[shared],
        help="measure the paper's claims and draw its figures",
        description="Measure the claims of Ji and Telgarsky (2019) on synthetic and real data, for "
        "gradient flow and descent, with 4 layers and with 1; write figures, records and a report.",
    )
    reproduce.add_argument(
        "--out", metavar="DIR", default="reproduction", help="default: %(default)s"
    )
    reproduce.add_argument("--quick", action="store_true", help="a smaller version of everything")
    reproduce.add_argument(
        "--dataset",
        metavar="NAME",
        default=None,
        help="the real data set: digits-A-B, iris-A-B, wine-A-B with two classes A and B, "
        "breast-cancer, or digits, iris, wine with all classes; default: wine-0-1",
    )
    reproduce.add_argument(
        "--classes",
        action="store_const",
        dest="dataset",
        const="digits",
        help="all ten digits as classes, with cross-entropy: the same as --dataset digits",
    )
    reproduce.add_argument(
        "--images",
        action="store_true",
        help="the paper's last figure instead: dense layers of a convolutional network on pictures",
    )
    reproduce.add_argument(
        "--data",
        metavar="NAME|PATH",
        default=None,
        help="with --images: digits, mnist-5k, photographs, an NPZ file with inputs and labels, or "
        "a folder with the binary files of CIFAR-10; default: digits",
    )
    reproduce.add_argument(
        "--epochs", metavar="N", type=float, default=None, help="with --images; default: 60"
    )
    reproduce.add_argument(
        "--seeds", metavar="N", type=int, default=None, help="with --images; default: 3"
    )
    reproduce.set_defaults(command=_reproduce)

    run = commands.add_parser(
        "run",
        parents=[shared],
        help="the same for your own data, described in a TOML file",
        description="Follow flow and descent on the problem that a TOML file describes; write "
        "figures, records and a report. examples/two_species.toml documents every key.",
    )
    run.add_argument("config", metavar="CONFIG.toml")
    run.add_argument("--out", metavar="DIR", default=None, help="default: out/NAME of the file")
    run.set_defaults(command=_run)

    sweep = commands.add_parser(
        "sweep",
        parents=[shared],
        help="one trajectory at every point of a grid, described in a TOML file",
        description="Follow flow or descent at every combination of the values that the table "
        "[sweep] of a TOML file lists; write one record and a phase diagram. After a kill the same "
        "command goes on. examples/depth_and_scale.toml shows how.",
    )
    sweep.add_argument("config", metavar="CONFIG.toml")
    sweep.add_argument("--out", metavar="DIR", default=None, help="default: out/NAME of the file")
    engine = sweep.add_mutually_exclusive_group()
    engine.add_argument(
        "--workers", metavar="N", type=int, default=None, help="follow groups in N processes"
    )
    engine.add_argument(
        "--dask",
        metavar="ADDRESS",
        default=None,
        help="follow groups on the workers of a dask scheduler: its address, as "
        "tcp://host:8786, or its scheduler file; DIR must be one that they see",
    )
    sweep.set_defaults(command=_sweep)

    check = commands.add_parser(
        "check",
        parents=[shared],
        help="the solvers against every closed form, on this machine",
        description="Follow every flow that has a closed form at the default tolerances and print "
        "the correct digits; about a minute. Exit code 1 if any has fewer than eight.",
    )
    check.set_defaults(command=_check)
    return parser


class _Version(argparse.Action):
    """``--version``, without importing anything until it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from gflow.record import versions

        for package, number in versions().items():
            print(f"{package.removesuffix('_version')} {number}")
        parser.exit()


def _reproduce(options: argparse.Namespace) -> int:
    from gflow.report import reproduce

    _without_display()
    given = {name: getattr(options, name) for name in ("data", "epochs", "seeds")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.images:
        return _reproduce_images(options, given)
    if given:
        raise ValueError(f"`--{next(iter(given))}` is for `--images`; give both, or neither.")
    outcomes = reproduce.reproduce(
        options.out,
        dataset=options.dataset or reproduce.REAL,
        quick=options.quick,
        progress=False if options.no_progress else None,
    )
    return _exit_code(outcomes)


def _reproduce_images(options: argparse.Namespace, given: dict[str, Any]) -> int:
    from gflow.report.images import reproduce_images

    if options.dataset or options.quick:
        other = "--dataset" if options.dataset else "--quick"
        raise ValueError(f"`{other}` is not for `--images`; choose with --data and --epochs.")
    outcome = reproduce_images(
        options.out, progress=False if options.no_progress else None, **given
    )
    return FAILED if outcome.unfinished or outcome.verdict[0].startswith("no") else 0


def _run(options: argparse.Namespace) -> int:
    from pathlib import Path

    from gflow.report import config, experiment, reproduce

    _without_display()
    made = config.read(options.config)
    folder = options.out or Path("out") / Path(options.config).stem
    outcomes = reproduce.compute_and_write(
        [made],
        experiment.check_folder(folder),
        title=f"{made.name}: {_whose_claims(made.data.offers)}",
        progress=False if options.no_progress else None,
    )
    return _exit_code(outcomes)


def _whose_claims(offers: frozenset[str]) -> str:
    if "targets" in offers:
        return "claims about flows of the square loss"
    return "the claims of Ji and Telgarsky (2019)"


def _sweep(options: argparse.Namespace) -> int:
    from pathlib import Path

    import gflow
    from gflow.report import experiment

    _without_display()
    folder = experiment.check_folder(options.out or Path("out") / Path(options.config).stem)
    progress = False if options.no_progress else None
    with _engine(options) as executor:
        found = gflow.sweep(
            options.config, folder=folder / "groups", executor=executor, progress=progress
        )
    written = []
    if not found.chunks:  # what is too large to be read stays in its groups
        gflow.save(found, folder / "sweep.nc")
        written.append("sweep.nc")
    ends = found.status.values.ravel().tolist()
    interrupted = "interrupted" in ends
    if len(gflow.plot.swept(found)) >= 2 and not interrupted:
        gflow.plot.save_figure(gflow.plot.phase_diagram(found), folder / "phase_diagram.png")
        written.append("phase_diagram.png")
    counts = ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))
    print(f"{len(ends)} runs: {counts}; wrote {' and '.join(written or ['groups'])} in {folder}")
    if interrupted:
        return INTERRUPTED
    return 0 if set(ends) == {"reached"} else FAILED


@contextlib.contextmanager
def _engine(options: argparse.Namespace) -> "Iterator[Executor | None]":
    """The processes that a sweep is to use."""
    if options.workers is not None:
        import concurrent.futures as cf
        import multiprocessing as mp

        from gflow.problem.arguments import positive_count

        count = positive_count("--workers", options.workers)
        with cf.ProcessPoolExecutor(count, mp_context=mp.get_context("spawn")) as executor:
            yield executor
    elif options.dask is not None:
        try:
            from distributed import Client
        except ModuleNotFoundError as error:
            raise ValueError(
                "`--dask` needs dask's scheduler: `pip install gflow[distributed]`."
            ) from error
        of_file = os.path.exists(options.dask)
        where = {"scheduler_file" if of_file else "address": options.dask}
        with Client(**where) as client:
            yield client.get_executor()
    else:
        yield None


def _check(options: argparse.Namespace) -> int:
    from gflow.report.check import check

    found = check(show=True)
    print(f"\n{found.summary}")
    return 0 if found.passed else FAILED


def _cache_programs() -> None:
    """Keep compiled programs for the next command, where that can be done."""
    from gflow.programs import cache_programs

    with contextlib.suppress(OSError, RuntimeError):  # no folder, no home
        cache_programs()


def _exit_code(outcomes: list) -> int:
    return FAILED if any(outcome.failed for outcome in outcomes) else 0


def _without_display() -> None:
    import matplotlib

    matplotlib.use("Agg")


if __name__ == "__main__":
    sys.exit(main())
