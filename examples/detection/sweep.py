"""The paper's Table 3b in small: Mask R-CNN with 1, 2, 4 and 8 workers, by the linear rule.

    python examples/detection/sweep.py runs/detection --backbone runs/backbone

Goes on with what is left of it, and prints the table of what there is. Each training takes minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
WORKERS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--backbone", type=Path, help="run or model.safetensors of hvd-lb; without: the table only"
    )
    parser.add_argument("--seeds", type=int, default=3)
    options, more = parser.parse_known_args()  # `more` are train.py's
    garments = options.folder / "garments"
    if options.backbone:
        if not (garments / "val.json").exists():
            subprocess.run([sys.executable, HERE / "garments.py", garments], check=True)
        for seed in range(options.seeds):
            for workers in WORKERS:
                output = options.folder / f"k{workers}-seed{seed}"
                if not (output / "result.json").exists():
                    print(f"{output}:", flush=True)
                    given = ["--backbone", options.backbone, "--output", output, "--workers", workers]
                    command = [HERE / "train.py", garments, *given, "--seed", seed, *more]
                    subprocess.run([sys.executable, *map(str, command)], check=True)
    print(table([json.loads(file.read_text()) for file in sorted(options.folder.glob("*/result.json"))]))


def table(results: list[dict[str, float]]) -> str:
    """In Markdown: means and standard deviations over seeds."""
    lines = ["| k | kn | steps | seeds | box AP | mask AP |", "|---|---|---|---|---|---|"]
    for workers in sorted({result["workers"] for result in results}):
        of = [result for result in results if result["workers"] == workers]
        figures = [_mean([result[name] for result in of]) for name in ("box_ap", "mask_ap")]
        lines.append(f"| {workers} | {2 * workers} | {of[0]['steps']} | {len(of)} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
