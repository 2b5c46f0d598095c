"""What differs between two `reproducible.rounding_environment`s. Without torch: the head of a job asks, too."""

from __future__ import annotations

from typing import Any

from hvd_lb.machine.cpu import KERNEL_VARIABLES

#: Variables of which torch's capability does not tell.
SEEN_NOWHERE_ELSE = tuple(name for name in KERNEL_VARIABLES if name != "ATEN_CPU_CAPABILITY")


def rounding_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two `rounding_environment`s, in words.

    Of what is None now, not known, nothing is said, nor of what was not recorded before, by an older version.
    """
    differences = []
    for name in sorted(before.keys() | (now.keys() & {*SEEN_NOWHERE_ELSE})):
        old, new = before.get(name), now.get(name)
        if name == "cpu_features":
            old, new = set(old or ()), set(new or ())
            changes = [f"without {item}" for item in sorted(old - new)]
            changes += [f"with {item}" for item in sorted(new - old)]
            differences += [f"CPU {', '.join(changes)}"] if changes else []
        elif old != new and name in SEEN_NOWHERE_ELSE:
            differences.append(f"{name}: {old or 'not set'} → {new or 'not set'}")
        elif old != new and new is not None:
            differences.append(f"{name}: {old} → {new}")
    return differences
