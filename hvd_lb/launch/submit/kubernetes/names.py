"""Which job of a cluster is which run's: its name, and the annotations that say whose it is.

A run is told by where it writes. Two people's runs whose last folders have one name are two jobs, and so are those that
write to the same path of two volumes; the same run is one job wherever its volume is mounted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence

# The longest name that leaves room for "-worker-9999", "-launcher" and "-node-0-9999" in a host name of 63 characters.
_NAME_LENGTH = 50
_DIGITS = 8
RUN, OUTPUT, COMMAND = "hvd-lb-run", "hvd-lb-output", "hvd-lb-command"


def job_name(name: str, output: str) -> str:
    """What of `name` Kubernetes takes for a service and in host names, and eight digits that stand for `output`."""
    words = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    if not re.match("[a-z]", words):
        words = f"hvd-lb-{words}"
    return f"{words[: _NAME_LENGTH - 1 - _DIGITS].strip('-')}-{_digest(output)[:_DIGITS]}"


def run_annotations(name: str, output: str, command: Sequence[str]) -> dict[str, str]:
    """What a job says of its run: its name as it was given, where it writes, and a digest of its command."""
    return {RUN: _text(name), OUTPUT: _text(output), COMMAND: _digest(json.dumps(list(command)))[:16]}


def whose(job: Mapping[str, object], ours: Mapping[str, str]) -> str | None:
    """Whose a job of our name is, when it is not ours, in words."""
    metadata = job.get("metadata")
    said = (metadata.get("annotations") or {}) if isinstance(metadata, dict) else {}
    if OUTPUT not in said:
        return "not of hvd-lb"
    return None if said[OUTPUT] == ours[OUTPUT] else f"of the run in {said[OUTPUT]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _text(text: str) -> str:
    """With bytes that are no text, as file names may have, written out."""
    return text.encode("utf-8", "backslashreplace").decode()
