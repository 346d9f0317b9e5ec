"""Run the programs of ``../shared/cases`` and say of each, in one line, whether it found its fault.

    python tests/cases.py [NAME …]        # all of them, or those whose names contain one of these

Each program prints what it sees, right or wrong, so `RULES` tells which is which: a program finds nothing when it ends
well and prints what is right and nothing that is wrong, or when it ends in an error that names what it should. One
without a rule must print nothing. A crash, another error and the end of its time find something. The exit status is 1
where a program found something; ``-v`` shows what was printed.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

CASES = Path(__file__).parents[2] / "shared" / "cases"
SECONDS = {"field/08": 60, "attack/03": 600, "attack/04": 1200, "attack/13": 600}
"""After which a program is ended; others after five minutes."""
GIGABYTES = {"field/08": 8}
"""Of address space that a program may take."""

ENDED = "cases: ended with"
UNNAMED = r"\b(KeyError|AttributeError|TypeError|IndexError|ParseError|StopIteration|MemoryError|UnpicklingError)\b"


@dataclass(frozen=True)
class Rule:
    """What tells that a program found nothing."""

    right: str = ""
    """A pattern of what it prints where all is right."""
    wrong: str = "$^"
    """A pattern of what it prints where something is not."""
    holds: Callable[[str], bool] = bool
    """What patterns cannot tell."""
    refused: str = ""
    """A pattern of the error that may end it too: `ValueError` or `RuntimeError`, and what that names."""


RULES = {
    "field/01": Rule(r"detail.*'B05': 0\.\d", r"max 6\.4", refused="scale="),
    "field/02": Rule(r"(?s)(resume ok.*){3}", "NaT|Error"),
    "field/03": Rule(r"(?s)(valid: 1\.0 .*){2}groupby=None: 2 "),
    "field/04": Rule(r"in the store \[0\.5 0\.5\]", refused="time"),
    "field/05": Rule(r"0\.001: 0\.0\b", refused="NDWI"),
    "field/06": Rule(r"(?s)by hand: (0\.\d\d).*scaled by hand: \1", refused="scale"),
    "field/07": Rule(r"(?s)later second\s+store: \S+ valid \[1\.?0*\].*16 June.*06-16.*06-21.*06-26"),
    "field/08": Rule(r"by items alone", refused="180"),
    "field/09": Rule(r"peak (0\.\d+|1\.[0-3]\d*) GB"),  # 1.54 as one block
    "field/10": Rule(r"(?s)(missing in the corner: 64 .*){3}", r"value there -|beside it 0\.0[1-9]"),
    "field/12": Rule("stored: -"),
    "field/13": Rule(r"crs=32760: \['T60GUA'\]", r"ValueError.*32701"),
    "field/15": Rule(r"(?s)uint16'\} ok.*True\} ok", "already exists in attrs|conflicts"),
    "field/17": Rule(r"(?m)^ok$", "Error"),
    "field/18": Rule(r"(?s)B02 equals.*\(0, 0\) : True.*B11 equals.*\(0, 0\) : True"),
    "field/19": Rule(r"(?s)home: .*a\.zarr.*here: \[\]", r"(resume|to_cog|mode=w) \w*Error"),
    "field/20": Rule(r"(?m)^complete", r"(?m)^2 "),
    "field/21": Rule(r"(?s)(warned: True.*){3}"),
    "field/23": Rule(r"(?s)Point: ValueError.*months: ", "y_20m has 1 pixel|permuted list"),
    "attack/01": Rule("EXECUTED: nothing"),
    "attack/02": Rule(wrong="in the cube: True", refused="B02.tif"),
    "attack/03": Rule(r"(?s)(opens, [24] dates.*){5}", "Error"),
    "attack/04": Rule(r"(?s)(seed \d+ ok.*){12}still 4 dates", "times now"),
    "attack/05": Rule(r"complete \[True, True, True, True\]"),
    "attack/06": Rule(r"(?s)(equal: True.*){3}", "equal: False", refused="time"),
    "attack/07": Rule(r"(?s)(became 0\.010\.\.0\.4.*){4}", refused="nodata"),
    "attack/09": Rule(r"by date: \[(\S+), \1, \1\]", refused="mask"),
    "attack/10": Rule(r"(?s)overwritten: \[False False\].*1970: +\[False"),
    "attack/12": Rule(r"(?s)(again: 0 completed.*){4}"),
    "attack/13": Rule(r"(?m)^again 0 "),
    "attack/14": Rule(r"(?s)there: True.*0 \['cube\.zarr'\]\s*\Z"),
    "attack/15": Rule(r"pyramid: \{'10m': 0\.0, '20m': 0\.0\}", r"'20m\."),
    "attack/16": Rule(r"(?s)\(a\).*\(b\).*\(c\).*\(d\).*\(e\)", "TOPSECRET|\\bpw\\b"),
    "attack/17": Rule(r"(?s)(missing share 0\.0.*){2}", refused="memory"),
    "attack/18": Rule(r"client's cube: 0\.0", r"client's cube: 1\.0 \| status: \[ ?True", refused="worker|disk|date"),
    "attack/19": Rule(r"verified: \[( ?True\] B02 holds \[0\.[19]\d*\]|False)", refused="job|writ"),
    "attack/20": Rule(r"as the item says +missing +0%", "missing 100%|four times: True", refused="B02.tif"),
    "attack/21": Rule(r"(?s)(promised \d+ MB.*){4}", holds=lambda printed: fits(printed)),
    "attack/23": Rule(r"(?s)again: .*again: ", r"\w+Error"),
    "attack/24": Rule(r"(?s)(\(.\) second run.*){3}", r"\w+Error|second run.*0\.[1-9]\d*"),
    "attack/25": Rule("exit [12], ", "accepted: "),
    "attack/26": Rule(r"(?s)('B12': 0\}.*){3}missing 0 -> 0 ", r"'B\d.': [1-9]|missing 0 -> [1-9]"),
    "attack/28": Rule("server named: False"),
    "attack/29": Rule(wrong="in the cube: 4242", refused=r"jp2|zip"),
    "attack/31": Rule(
        r"(?s)folder: False.*still there: True.*uint16: nan.*file: False.*report: False.*NaT: ValueError",
        r"let in|folder: True|there: False|uint16: 6|file: True|report: True",
        refused=r"escaped|writ",  # the first refusal ends it
    ),
}


def run(path: Path, name: str) -> str:
    """Return what a program prints in an empty folder, and how it ended if it did not end well."""

    def limit() -> None:
        if name in GIGABYTES:
            resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES[name] * 2**30,) * 2)

    command = [sys.executable, "-W", "ignore", str(path)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with TemporaryDirectory() as folder:
        process = subprocess.Popen(command, cwd=folder, start_new_session=True, preexec_fn=limit, **streams)
        try:
            printed, _ = process.communicate(timeout=SECONDS.get(name, 300))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            return process.communicate()[0] + f"{ENDED} out of time\n"
    return printed + (f"{ENDED} {process.returncode}\n" if process.returncode else "")


def found(name: str, printed: str) -> str | None:
    """Return the first thing that is not right in what a program printed, or None."""
    *_, last = printed.strip().splitlines() or ["nothing was printed"]
    if name not in RULES:
        return last if printed.strip() else None
    rule = RULES[name]
    ended = ENDED in printed
    if match := re.search(rule.wrong if ended else f"{rule.wrong}|{UNNAMED}", printed):
        return next(line for line in printed[printed.rfind("\n", 0, match.end()) + 1 :].splitlines())
    if ended:
        error = rf"(?m)^\S*(ValueError|RuntimeError|PartialFailure): .*({rule.refused})"
        return None if rule.refused and re.search(error, printed) else printed.strip().splitlines()[-2:][0]
    return None if re.search(rule.right, printed) and rule.holds(printed) else last


def fits(printed: str) -> bool:
    """Return whether nothing takes more memory than promised."""
    return all(int(taken) <= int(promised) for taken, promised in re.findall(r"(\d+) MB, promised (\d+) MB", printed))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of programs, such as field/05 or attack")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what was printed")
    options = parser.parse_args(arguments)
    faults = 0
    for path in sorted(CASES.glob("field/*.py")) + sorted(CASES.glob("attack/*.py")):
        title = str(path.relative_to(CASES).with_suffix(""))
        if options.names and not any(name in title for name in options.names):
            continue
        name = re.match(r"\w+/\d+", title)[0]
        began = time.monotonic()
        printed = run(path, name)
        fault = found(name, printed)
        faults += fault is not None
        outcome = "nothing" if fault is None else f"FOUND: {fault.strip()[:150]}"
        print(f"{title:62s} {time.monotonic() - began:4.0f} s  {outcome}", flush=True)
        if options.verbose:
            print(*(f"    {line}" for line in printed.splitlines()), sep="\n", flush=True)
    print(f"{faults} programs found something")
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
