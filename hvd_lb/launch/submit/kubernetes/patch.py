"""`--k8s-patch FILE`: what of a cluster no option tells, merged into the manifests of a run.

A JSON merge patch (RFC 7386): objects are merged, null removes, all else replaces. Lists would be replaced too, so that
a variable could not be added to a container. Lists that Kubernetes merges by a key (`containers` by `name` and so on,
its strategic merge patch) are merged here as it does: an item with the key of one that is there is merged into it,
another is added, and `$patch: delete` removes one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hvd_lb.errors import UserError
from hvd_lb.launch.submit.kubernetes.pod import Manifest
from hvd_lb.recipe_file import read_named

_MOST_BYTES = 1 << 20
# patchMergeKey of Kubernetes' core/v1 types, and of JobSet's list of jobs.
_MERGED_BY = {
    **dict.fromkeys(("containers", "initContainers", "env", "volumes", "imagePullSecrets"), "name"),
    "replicatedJobs": "name",
    "volumeMounts": "mountPath",
}
# What makes the manifests those of the run: whose they are, what is run, on how many pods, and where it writes.
_OF_THE_RUN = re.compile(
    r"apiVersion|kind|metadata\.(name|namespace|annotations\.hvd-lb-.*)|spec\.runtimeRef\..*"
    r"|.*\.(command|replicas|slotsPerWorker|numNodes|numProcPerNode|sshAuthMountPath|launcherCreationPolicy)"
    r"|.*\.volumeMounts\[.*"
)


def read_patch(path: Path) -> list[Manifest]:
    """The documents of a patch, YAML or JSON; UserError in one line for what is none."""
    try:
        text = read_named(path, _MOST_BYTES).decode("utf-8")
        documents = [one for one in yaml.load_all(text, _Loader) if one is not None]  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) else getattr(error, "problem", None) or "no YAML"
        )
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"--k8s-patch {path}{where}: {reason}: expected a manifest in part, as YAML"
        ) from None
    if not documents or not all(isinstance(one, dict) and _is_json(one) for one in documents):
        raise UserError(
            f"--k8s-patch {path}: expected a manifest in part, fields and values such as `spec:` and what is below it"
        )
    return documents


def patched(documents: Sequence[Manifest], patches: Iterable[Manifest]) -> list[Manifest]:
    """The manifests of a run with each patch merged into that of its `kind`, which may be left out where there is one.

    UserError where a patch belongs to none, or would make it another run's.
    """
    results = list(documents)
    for patch in patches:
        kinds = [document["kind"] for document in documents]
        kind = patch.get("kind", kinds[0] if len(kinds) == 1 else None)
        if kind not in kinds:
            said = f"is for kind {kind}" if kind else "does not say its kind"
            raise UserError(f"--k8s-patch {said}: expected `kind: ` with one of {', '.join(kinds)}")
        index = kinds.index(kind)
        results[index] = _merged(results[index], patch)
        after = dict(_leaves(results[index]))
        for path, value in _leaves(documents[index]):
            if _OF_THE_RUN.fullmatch(path) and after.get(path) != value:
                raise UserError(
                    f"--k8s-patch changes {path} of the {kind}, by which it is this run's: leave that out of the "
                    "patch, and see `hvd-lb train --help` for the option that sets it"
                )
    return results


def _merged(value: Any, patch: Any, field: str = "") -> Any:
    if isinstance(patch, dict):
        result = dict(value) if isinstance(value, dict) else {}
        for name, item in patch.items():
            if item is None:
                result.pop(name, None)
            else:
                result[name] = _merged(result.get(name), item, name)
        return result
    key = _MERGED_BY.get(field)
    if key and isinstance(patch, list) and all(_has(item, key) for item in patch):
        items = {item[key]: item for item in value or ()}
        for item in patch:
            if item.get("$patch") == "delete":
                items.pop(item[key], None)
            else:
                items[item[key]] = _merged(items.get(item[key]), item)
        return list(items.values())
    return patch


def _leaves(value: Any, path: str = "", field: str = "") -> Iterator[tuple[str, Any]]:
    """What a document says, each with its place: `spec.template.spec.containers[worker].image`."""
    key = _MERGED_BY.get(field)
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else name, name)
    elif key and isinstance(value, list) and all(_has(item, key) for item in value):
        for item in value:
            yield from _leaves(item, f"{path}[{item[key]}]")
    else:
        yield path, value


def _has(item: Any, key: str) -> bool:
    return isinstance(item, Mapping) and isinstance(item.get(key), str)


def _is_json(value: Any) -> bool:
    """YAML also knows other keys than text."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_json(item) for name, item in value.items())
    return not isinstance(value, list) or all(map(_is_json, value))


class _Loader(yaml.SafeLoader):
    # A date is text to Kubernetes.
    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML has it
        first: [(tag, words) for tag, words in kinds if not tag.endswith(":timestamp")]
        for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
