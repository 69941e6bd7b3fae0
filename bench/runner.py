"""The one runner of all benchmark questions: ``shmx bench``."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

from . import malloc_policy, questions
from .options import Options
from .report import Report

__all__ = ["discover", "main"]

STATUS_OK, STATUS_FAILED, STATUS_USAGE = 0, 1, 2


def discover() -> dict[str, str]:
    """Name and first line of the docstring of every question, without importing any of them."""
    return {
        info.name: _first_line(f"{questions.__name__}.{info.name}")
        for info in pkgutil.iter_modules(questions.__path__)
        if not info.name.startswith("_")
    }


def _first_line(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""
    return text.partition("\n")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the questions asked for; print, and write files where wanted.

    Returns
    -------
    int
        0; 1 if a question could not be answered; 2 if something is missing or an option is wrong. Marks that do not
        hold are reported, and are no failure: they depend on the machine.
    """
    known = discover()
    arguments = _parse(argv, known)
    if arguments.list:
        width = max(map(len, known))
        for name, line in known.items():
            print(f"{name:{width}}  {line}")
        return STATUS_OK
    options = Options(
        rounds=arguments.rounds,
        quick=arguments.quick,
        sizes=arguments.sizes,
        transports=arguments.transports,
        consumers=arguments.consumers,
        modes=arguments.modes,
        malloc=arguments.malloc,
    )
    try:
        return _run(arguments.questions or list(known), options, arguments.json, arguments.plots)
    except ModuleNotFoundError as error:
        print(f"shmx bench: {error.name} is not installed: pip install 'torch-shmx[bench]'", file=sys.stderr)
        return STATUS_USAGE


def _run(names: Sequence[str], options: Options, json_file: Path | None, plots_folder: Path | None) -> int:
    # Here, so that --help and --list need nothing but the standard library.
    from . import report as reports
    from .process_tree import MeasurementError

    modules = [importlib.import_module(f"{questions.__name__}.{name}") for name in names]
    if plots_folder is not None:
        from . import plots
    facts = reports.machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items()), end="\n\n")
    answered: list[Report] = []
    status = STATUS_OK
    for name, module in zip(names, modules, strict=True):
        try:
            report: Report = module.measure(options)
        # The other questions may still be answered.
        except (MeasurementError, ValueError) as error:
            print(f"shmx bench: {name}: {error}", file=sys.stderr)
            status = max(status, STATUS_FAILED if isinstance(error, MeasurementError) else STATUS_USAGE)
            continue
        print(report.text(), flush=True)
        answered.append(report)
        # After every question: a run that is broken off keeps what it has.
        if json_file is not None:
            reports.write(json_file, answered, facts)
        if plots_folder is not None:
            plots.draw(report, plots_folder)
    return status


def _parse(argv: Sequence[str] | None, known: dict[str, str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="shmx bench",
        description="Measure shmx beside its lower bounds and its peers. Questions:\n\n"
        + "\n".join(f"  {name:10} {line}" for name, line in known.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="which to answer (default: all)")
    parser.add_argument("--list", action="store_true", help="list the questions")
    parser.add_argument("--quick", action="store_true", help="3 rounds, small sizes: does it work?")
    parser.add_argument("--rounds", type=_positive, metavar="N", help="rounds that count (default: the question's)")
    parser.add_argument("--sizes", type=_names, default=(), metavar="A,B", help="4KiB, 16MiB, 8x24MiB, mm32 ...")
    parser.add_argument("--transports", type=_names, default=(), metavar="A,B", help="e.g. shmx,iceoryx2")
    parser.add_argument("--consumers", type=_numbers, default=(), metavar="N,M", help="e.g. 1,4")
    parser.add_argument("--modes", type=_modes, default=(), metavar="A,B", help="view, own (latency; default: both)")
    parser.add_argument(
        "--malloc", choices=malloc_policy.POLICIES, default="settled", help="of consumers (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write a PNG for every table over sizes or numbers")
    arguments = parser.parse_args(argv)
    for name in arguments.questions:
        if name not in known:
            parser.error(f"no question {name!r}; choose from {', '.join(known)}")
    return arguments


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def _modes(text: str) -> tuple[str, ...]:
    names = _names(text)
    if not set(names) <= {"view", "own"}:
        raise argparse.ArgumentTypeError(f"{text!r}: write view, own, or view,own")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_positive(part) for part in text.split(",")))
