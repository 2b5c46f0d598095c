"""All that can be measured on CPUs, each beside its peer, within 20 minutes; what is printed is also in results.json.

    python benchmarks/cpu.py [--minutes 20] [--only first_step,...] [--output results.json]

Benchmarks run in processes of their own, the most telling first; one that fails or takes too long ends no other, and is
told, by exit code 1 too. Results of those that do not run now stay in the file. Run it where nothing else runs: ratios
of sides that take turns bear a busy machine, seconds do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from limited import file_to_write, minutes, names_of, run_limited

# Name, arguments and a limit in seconds; all of them are files beside this one.
BENCHMARKS: list[tuple[str, list[str], float]] = [
    ("end_to_end", ["--rounds", "1"], 600),
    ("first_step", ["--rounds", "3"], 150),
    ("optim", [], 100),
    ("overhead", ["--turns", "1"], 90),
    ("reproducible", ["--seconds", "4"], 150),
    ("together", ["--seconds", "10", "--rows", "0,1,2,3,4,5"], 150),
    ("loader", ["--rounds", "2"], 120),
    ("growth", [], 240),
    ("index", ["1000000", "5000"], 90),
    ("shuffle", ["--rounds", "3"], 60),
    ("latency", ["--seconds", "2"], 120),
    ("buckets", ["resnet50", "efficientnet_b0", "vit_b_16"], 60),
    ("sums", [], 60),
    ("waiting", [], 60),
    ("startup", ["--ranks", "16"], 60),
    ("remote", ["--seconds", "2", "--images", "1024"], 60),
    ("fixed_point", [], 60),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for name, *_ in BENCHMARKS]
    parser.add_argument("--minutes", type=minutes, default=20)
    parser.add_argument("--only", type=names_of(names), default=names, help="names, with commas")
    parser.add_argument("--output", type=file_to_write, default=Path("results.json"))
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    try:
        results = json.loads(options.output.read_text()) if options.output.exists() else {}
        results = {name: found for name, found in results.items() if name in names}
    except (ValueError, AttributeError):
        parser.error(f"{options.output} is not of this program: name another --output, or remove it")
    failed = []
    for name, arguments, seconds in BENCHMARKS:
        if name not in options.only:
            continue
        began = time.monotonic()
        file = Path(__file__).with_name(f"{name}.py")
        output, errors, failure = run_limited(
            [sys.executable, str(file), *arguments], min(seconds, end - began)
        )
        results[name] = {
            "machine": machine(),
            "arguments": arguments,
            "seconds": round(time.monotonic() - began, 1),
            "rows": [_row(line) for line in output.splitlines()],
            **({"failure": failure, "errors": errors[-1500:]} if failure else {}),
        }
        failed += [name] if failure else []
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"== {name} ({results[name]['seconds']:.0f} s) {failure}", output, sep="\n", flush=True)
    if failed:
        sys.exit(f"not all of it was measured: {', '.join(failed)}; see {options.output}")


def machine() -> dict[str, Any]:
    about = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition(":")[2]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": about.partition("\n")[0].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _row(line: str) -> Any:
    """A line of JSON as what it says, any other as it is."""
    try:
        return json.loads(line)
    except ValueError:
        return line


if __name__ == "__main__":
    main()
