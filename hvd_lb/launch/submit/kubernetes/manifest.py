"""`--launcher kubernetes`: what of a cluster a run is made of, as its user wants it changed; `follow` submits it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.kubernetes.mpijob import mpijob
from hvd_lb.launch.submit.kubernetes.options import KubernetesOptions
from hvd_lb.launch.submit.kubernetes.patch import patched
from hvd_lb.launch.submit.kubernetes.pod import Manifest
from hvd_lb.launch.submit.kubernetes.trainjob import trainjob


def manifests(submission: Submission, options: KubernetesOptions) -> list[Manifest]:
    """The documents of a run in the order they are made, the job last; UserError when the run could not work so."""
    made = trainjob(submission, options) if options.kind == "trainjob" else [mpijob(submission, options)]
    return patched(made, options.patch)


def to_yaml(documents: Sequence[Manifest]) -> str:
    """As text, in the order they were written; every string is one for Go's YAML as well."""
    text: str = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    return text


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Go's YAML takes 1e-3, 0o17, y and more for something else than a string, where Python's does not.
    plain = re.fullmatch(r"(--)?[A-Za-z/][A-Za-z0-9/._-]+", text, re.ASCII)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)
