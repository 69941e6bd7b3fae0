"""Checks the models of the lifetime protocol with spin: the protocol holds, and every mutant of it is caught.

    python tests/model/check.py [--long] [--jobs N] [--only WORD]

Exit status 0 only if every search was complete and no verdict is unexpected.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

MODELS = Path(__file__).resolve().parent
RULES = {1: "rule 1", 2: "rule 2", 3: "rule 3", 6: "rule 6", 7: "rule 7", 10: "reuse", 11: "unmapped", 12: "stuck"}
MAX_DEPTH = 10_000  # steps; the longest run of a model takes a few hundred
SAFETY = ("-DSAFETY",)
CYCLES = ("-DNP", "-DNOFAIR")  # reports a run that never ends
LIVENESS = ("-DNFAIR=4",)  # the formula at the end of the model, under weak fairness: who can go on does, in the end
MEGABYTES = 2500
LONG_MEGABYTES = 6000
SECONDS = 600
LONG_SECONDS = 5400

# The bounds of a search by its name. Sizes are explained at the top of each model.
BOUNDS = {
    "block": {
        "messages": "",
        "readers": "READERS=2 MESSAGES=2",
        "revoke": "REVOKES=1 LATE=0",
        "expiry": "EXPIRIES=1 MESSAGES=2",
        "peer killed": "KILLS=1 SWEEPS=1 MESSAGES=2",
        "owner killed": "KILLS=1 VICTIM=0 MESSAGES=2",
        "in the end": "KILLS=1 VICTIM=0 MESSAGES=2 LATE=0 RETIRES=1",
    },
    "arena": {
        "late": "STALE=0",
        "stale": "LATE=0",
        "readers": "READERS=2 LATE=0 STALE=0",
        "owner killed": "KILLS_OWNER=1 LEFT=1 LATE=0 STALE=0",
        "peer killed": "KILLS_PEER=1 LATE=0 STALE=0",
        "ends": "FORWARDS=0 LATE=0 STALE=0",
    },
    "threads": {
        "stale": "OTHER=0",
        "two blocks": "OLD=0",
        "ends": "OLD=0 OTHER=0",
    },
    "trim": {
        "late": "",
        "warm": "WARM=1 LATE=0",
        "owner killed": "KILLS=1 LATE=0",
    },
    "fork": {
        "sweep": "SWEEPS=1",
        "orphan": "ORPHAN=1",
        "killed": "KILLS=1 RETIRES=1",
        "orphan killed": "ORPHAN=1 KILLS=1 LOADS=0",
    },
    "orphan": {
        "late": "",
        "killed": "KILLS=1 DEAD_PEER=0",
        "creation": "CREATES=1 LOADERS=0",
        "in the end": "FOREVER=1 KILLS=1 LOADERS=0",
        "in the end, late": "FOREVER=1",
    },
}
LONG_BOUNDS = {
    "block": {
        "generations": "GENERATIONS=3 RETIRES=3",
        "one cell": "CELLS=1 LATE=2",
        "readers, more": "READERS=2",
        "readers, late": "READERS=2 LATE=2 MESSAGES=2",
        "owner, more": "KILLS=1 VICTIM=0",
        "revoke, late": "REVOKES=1",
        "expiry, long": "EXPIRIES=1",
        "revoke, killed": "KILLS=1 SWEEPS=1 REVOKES=1 MESSAGES=2",
        "revoke, owner": "KILLS=1 VICTIM=0 REVOKES=1 MESSAGES=2",
    },
    "arena": {
        "stale and late": "",
        "both killed": "KILLS_OWNER=1 KILLS_PEER=1 LEFT=1 LATE=0 STALE=0",
        "both, not left": "KILLS_OWNER=1 KILLS_PEER=1 LATE=0 STALE=0",
        "owner, late": "KILLS_OWNER=1 LEFT=1 STALE=0",
        "collector": "KILLS_OWNER=1 COLLECTS=1 FORWARDS=0 LATE=0 STALE=0",
    },
    "threads": {},
    "trim": {
        "warm, late": "WARM=1",
        "more": "PUBLISHES=3 TRIMS=3",
    },
    "fork": {
        "killed, sweep": "KILLS=1 SWEEPS=1",
        "orphan killed, load": "ORPHAN=1 KILLS=1",
    },
    "orphan": {
        "killed, dead peer": "KILLS=1",
        "in the end, killed": "FOREVER=1 KILLS=1",
    },
}
# What spin must report for a mutant: the bounds that show it, and the rules of which it may break any.
MUTANTS: dict[str, dict[int, tuple[str, set[int]]]] = {
    "block": {
        1: ("messages", {2}),
        2: ("messages", {1}),
        3: ("messages", {1}),
        4: ("messages", {1}),
        5: ("messages", {2}),
        6: ("messages", {1}),
        7: ("messages", {2}),
        8: ("peer killed", {1}),
        9: ("revoke", {10}),
        10: ("revoke", {10}),
        11: ("peer killed", {6}),
        12: ("messages", {2}),
        13: ("readers", {2, 10}),
        14: ("expiry", {2}),
        15: ("expiry", {2}),
    },
    "arena": {
        1: ("late", {2}),
        2: ("late", {1, 2}),
        3: ("late", {1, 2}),
        4: ("late", {1, 2}),
        5: ("late", {7}),
        6: ("late", {7}),
        7: ("stale", {7}),
        8: ("owner killed", {7}),
        9: ("late", {7}),
        10: ("late", {1, 2, 3}),
        11: ("owner killed", {7}),
        12: ("ends", set()),
    },
    "threads": {
        1: ("stale", {1}),
        2: ("stale", {1}),
        3: ("stale", {1}),
        4: ("stale", {1}),
        5: ("two blocks", {7}),
        6: ("stale", {7}),
    },
    "trim": {
        1: ("late", {1, 2}),
        2: ("late", {1, 2}),
        3: ("late", {11}),
        4: ("late", {11}),
        5: ("late", {11}),
        6: ("warm", {1, 11}),
        7: ("warm", {11}),
        8: ("late", {1, 2}),
        9: ("late", {1, 3}),
        10: ("late", {1, 2, 3}),
        11: ("owner killed", {7}),
    },
    "fork": {
        1: ("sweep", {1}),
        2: ("sweep", {1}),
        3: ("sweep", {6}),
        4: ("sweep", {1}),
        5: ("orphan", {7}),
        6: ("sweep", {6, 12}),
        7: ("orphan", {7}),
    },
    "orphan": {
        1: ("in the end", set()),
        2: ("late", {7}),
        3: ("late", {2}),
        4: ("late", {2}),
        5: ("killed", {7}),
        6: ("creation", {2}),
        7: ("creation", {2}),
        8: ("creation", {2}),
    },
}
# Situations that the bounds must reach, or the search has proved less than it seems.
WITNESSES = {
    "block": {
        1: "messages",
        2: "revoke",
        3: "messages",
        4: "messages",
        5: "owner killed",
        6: "messages",
        7: "peer killed",
        8: "messages",
        9: "expiry",
        10: "expiry",
    },
    "arena": {
        1: "late",
        2: "late",
        3: "owner killed",
        4: "owner killed",
        5: "late",
        6: "late",
        7: "owner killed",
        8: "late",
        9: "owner killed",
    },
    "threads": {1: "stale", 2: "stale", 3: "stale", 4: "stale"},
    "trim": {1: "late", 2: "late", 3: "late", 4: "late", 5: "late", 6: "warm", 7: "owner killed"},
    "fork": {1: "sweep", 2: "sweep", 3: "sweep", 4: "sweep", 5: "killed", 6: "killed"},
    "orphan": {
        1: "late",
        2: "creation",
        3: "killed",
        4: "killed",
        5: "late",
        6: "late",
        7: "creation",
        8: "creation",
    },
}


@dataclass(frozen=True)
class Run:
    """One search: a model, its bounds, and what is to come of it."""

    model: str
    bounds: str
    defines: str
    mutant: int = 0
    witness: int = 0
    breaks: frozenset[int] = frozenset()

    @property
    def finds_cycles(self) -> bool:
        """Whether the search looks for a run that never ends, and not at states."""
        return self.bounds == "ends"

    @property
    def checks_formula(self) -> bool:
        """Whether the search is for a run in which what is wanted never comes."""
        return self.bounds.startswith("in the end")

    @property
    def title(self) -> str:
        """What the search is about, for the table."""
        if self.mutant:
            return f"mutant {self.mutant}"
        return f"witness {self.witness}" if self.witness else "protocol"


@dataclass(frozen=True)
class Outcome:
    """What pan answered, and whether that is what it had to."""

    states: int
    depth: int
    seconds: float
    verdict: str
    expected: bool
    replay: str = ""


def runs(long: bool) -> Iterator[Run]:
    """All searches, the long ones first."""
    for model, bounds in BOUNDS.items():
        for name, defines in {**bounds, **(LONG_BOUNDS[model] if long else {})}.items():
            yield Run(model, name, defines)
    for model, mutants in MUTANTS.items():
        for mutant, (name, rules) in mutants.items():
            yield Run(model, name, BOUNDS[model][name], mutant=mutant, breaks=frozenset(rules))
    for model, witnesses in WITNESSES.items():
        for witness, name in witnesses.items():
            yield Run(model, name, BOUNDS[model][name], witness=witness)


def missing_runs() -> list[str]:
    """Mutants and witnesses that a model has and the tables above do not."""
    missing = []
    for model in BOUNDS:
        text = (MODELS / f"{model}.pml").read_text()
        for word, table, pattern in (
            ("mutant", set(MUTANTS[model]), r"MUTANT [!=]= (\d+)"),
            ("witness", set(WITNESSES[model]), r"MET\((\d+)\)"),
        ):
            found = {int(number) for number in re.findall(pattern, text)}
            missing += [f"{model}: {word} {number}" for number in sorted(found ^ table)]
    return missing


def number(pattern: str, text: str) -> int:
    """The integer that pan prints at a place, or 0."""
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def judge(run: Run, output: str) -> tuple[str, bool]:
    """The verdict on pan's output, and whether it is the expected one."""
    if re.search(r"max search depth too small|reached -DMEMLIM|out of memory|aborting", output):
        return "TRUNCATED", False
    errors = re.search(r"errors: (\d+)", output)
    if not errors:
        return "PAN FAILED", False
    if int(errors[1]) == 0:
        if "Search not completed" in output:
            return "TRUNCATED", False
        if run.mutant or run.witness:
            return ("NOT CAUGHT" if run.mutant else "NOT REACHED"), False
        return "holds", True
    rule = re.search(r"assertion violated \(\((\d+)>0\)&&", output)
    if rule:
        name = RULES[int(rule[1])]
        if run.mutant and int(rule[1]) in run.breaks:
            return f"caught, {name}", True
        return f"BREAKS {name}", False
    if "acceptance cycle" in output:
        if run.mutant and run.checks_formula:
            return "caught, never comes", True
        return "NEVER COMES", False
    if "non-progress cycle" in output:
        if run.mutant and run.finds_cycles:
            return "caught, never ends", True
        return "NEVER ENDS", False
    if run.witness and f"assertion violated ({run.witness}!={run.witness})" in output:
        return "reached", True
    first = re.search(r"pan:1: (.*?) \(at depth", output)
    return f"ERROR {first[1] if first else ''}", False


def search(run: Run, directory: Path, megabytes: int, seconds: int) -> Outcome:
    """Generates, compiles and runs the verifier in a directory of its own."""
    directory.mkdir()
    source = str(MODELS / f"{run.model}.pml")
    defines = [f"-D{define}" for define in run.defines.split()]
    defines += [f"-DMUTANT={run.mutant}", f"-DWITNESS={run.witness}"]
    options = SAFETY
    if not run.witness:
        options = CYCLES if run.finds_cycles else LIVENESS if run.checks_formula else SAFETY
    if options == LIVENESS:
        defines.append("-DLTL")
    # Short searches: compiling costs more than it saves.
    optimize = "-O0" if run.witness else "-O1" if run.mutant else "-O2"
    compile_ = ["gcc", optimize, "-w", "-DCOLLAPSE", f"-DMEMLIM={megabytes}", *options, "-o", "pan", "pan.c"]
    for command in (["spin", "-a", *defines, source], compile_):
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
        if done.returncode != 0:
            return Outcome(0, 0, 0.0, f"{command[0].upper()} FAILED", False, done.stdout + done.stderr)
    command = ["./pan", f"-m{MAX_DEPTH}", *{SAFETY: (), CYCLES: ("-l",), LIVENESS: ("-a", "-f")}[options]]
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Outcome(0, 0, time.monotonic() - start, "TIMEOUT", False)
    elapsed = time.monotonic() - start
    output = done.stdout + done.stderr
    verdict, expected = judge(run, output)
    replay = "" if expected else output
    if not expected and (directory / f"{run.model}.pml.trail").exists():
        trail = ["spin", "-p", "-g", "-k", f"{run.model}.pml.trail", *defines, source]
        steps = subprocess.run(trail, cwd=directory, capture_output=True, text=True).stdout.splitlines()
        replay += "\n".join(line.replace(f"{MODELS}{os.sep}", "") for line in steps)
    shutil.rmtree(directory)
    return Outcome(
        number(r"(\d+) states, stored", output),
        number(r"depth reached (\d+)", output),
        elapsed,
        verdict,
        expected,
        replay,
    )


def main() -> int:
    """Runs every search and prints one line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--long", action="store_true", help="larger bounds too: ten minutes, 2 GB a job")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="searches at a time (2)")
    parser.add_argument("--only", default="", help="only searches whose line contains this")
    parser.add_argument("--replay", action="store_true", help="print the steps that lead to an unexpected error")
    arguments = parser.parse_args()

    for tool in ("spin", "gcc"):
        if not shutil.which(tool):
            print(f"{tool} is needed to check the models; install it (apt-get install {tool})", file=sys.stderr)
            return 2
    if missing := missing_runs():
        print("not in both the model and the tables of check.py: " + ", ".join(missing), file=sys.stderr)
        return 2

    chosen = [run for run in runs(arguments.long) if arguments.only in f"{run.model} {run.title} {run.bounds}"]
    limits = (LONG_MEGABYTES, LONG_SECONDS) if arguments.long else (MEGABYTES, SECONDS)
    unexpected = 0
    start = time.monotonic()
    print(f"{'model':8}{'':12}{'bounds':20}{'states':>11}{'depth':>7}{'seconds':>9}  verdict")
    with (
        tempfile.TemporaryDirectory(prefix="shmx-model-") as scratch,
        ThreadPoolExecutor(max_workers=arguments.jobs) as pool,
    ):
        directories = [Path(scratch) / str(i) for i in range(len(chosen))]
        outcomes = pool.map(lambda run, directory: search(run, directory, *limits), chosen, directories)
        for run, outcome in zip(chosen, outcomes, strict=True):
            unexpected += not outcome.expected
            print(
                f"{run.model:8}{run.title:12}{run.bounds:20}{outcome.states:>11,}{outcome.depth:>7}"
                f"{outcome.seconds:>9.1f}  {outcome.verdict}",
                flush=True,
            )
            if arguments.replay and outcome.replay:
                print(outcome.replay, file=sys.stderr, flush=True)
    print(f"{len(chosen)} searches, {unexpected} unexpected, {time.monotonic() - start:.0f} s")
    return 1 if unexpected or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
