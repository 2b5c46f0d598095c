"""What a forecast knows of a cluster and of a device: YAML files, each figure with its source.

`clusters/*.yaml` and `devices/*.yaml` are shipped; `hvd-lb measure` writes a cluster's. Units are in the names of
fields: latencies in µs, bandwidths in Gbit/s in one direction (10⁹ bits), memory in GB (10⁹ bytes).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hvd_lb.errors import UserError, nearest, short_numbers
from hvd_lb.forecast.collectives import ALGORITHMS, Hierarchy, Link
from hvd_lb.recipe_file import dump_values, parse_values, read_text

Profile = TypeVar("Profile", bound=BaseModel)
Positive = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=1 << 20)]

_GBIT = 1e9 / 8  # bytes a second
_EXPECTED = {
    "missing": "is missing",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "finite_number": "expected a finite number",
    "string_type": "expected text",
    "model_type": "expected fields, each as `name: value`",
}


class _Figures(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class LinkProfile(_Figures):
    """One kind of link, as a server (or GPU) sees it."""

    latency_us: NotNegative  #: of one step of an algorithm
    bandwidth_gbit_s: Positive  #: of the line, in one direction
    efficiency: Share = 1.0  #: the share of it that reaches the data
    added_gbyte_s: Positive | None = None  #: what is added up a second; without it, adding takes no time
    error: Annotated[float, Field(ge=0, le=1)] = 0.2  #: relative standard deviation of these figures

    def link(self) -> Link:
        gamma = 1 / (self.added_gbyte_s * 1e9) if self.added_gbyte_s else 0.0
        return Link(1e-6 * self.latency_us, 1 / (self.bandwidth_gbit_s * self.efficiency * _GBIT), gamma)


class ClusterProfile(_Figures):
    """Equal hosts and their network. A figure that nobody has given is None, and what follows from it is left out."""

    name: str
    description: str = ""
    gpus_per_host: Count
    between: LinkProfile  #: hosts; all its network cards together
    inside: LinkProfile | None = None  #: one GPU to another; needed where a host has several
    host: LinkProfile | None = None  #: a GPU to its host, for buffers below 256 KB
    algorithm: str = "ring"
    cycle_ms: NotNegative = 1.0  #: how often the engine looks for gradients that are ready
    overhead_us: NotNegative = 0.0  #: of the engine for each allreduce, besides its steps
    exchange_slowdown: Factor = 1.0  #: how many times as long an allreduce takes while a host's cores compute
    compute_slowdown: Factor = 1.0  #: and computing while there is an allreduce, which needs a core, too
    most_gpus: Count | None = None
    gpu_memory_gb: Positive | None = None
    cores_per_host: Count | None = None
    loader_images_s: Positive | None = None  #: of a host
    price_per_gpu_hour: NotNegative | None = None
    gpu_hours_per_failure: Positive | None = None
    sources: dict[str, str] = {}

    @field_validator("algorithm")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ALGORITHMS:
            raise ValueError(
                f"unknown algorithm: expected {', '.join(ALGORITHMS)}{nearest(name, ALGORITHMS)}"
            )
        return name

    @model_validator(mode="after")
    def _whole(self) -> ClusterProfile:
        if self.gpus_per_host > 1 and self.inside is None:
            raise ValueError("inside is missing: a host with several GPUs has a link between them")
        known = dict(figures(self))
        for name in self.sources:
            if name not in known:
                raise ValueError(f"sources: {name!r} is no figure of this profile{nearest(name, known)}")
        return self

    def hierarchy(self) -> Hierarchy:
        between = self.between.link()
        inside = self.inside.link() if self.inside else between
        return Hierarchy(self.gpus_per_host, between, inside, self.host.link() if self.host else None)

    def to_yaml(self) -> str:
        return dump_values(self.model_dump(mode="json", exclude_none=True))


class DeviceProfile(_Figures):
    """What one device takes for a microbatch of one model, measured elsewhere."""

    name: str
    description: str = ""
    model: str
    image_size: Count
    per_gpu_batch: Count
    precision: str
    microbatch_ms: Positive  #: forward, backward and update
    backward_ms: Positive | None = None
    update_ms: NotNegative | None = None
    spread: Annotated[float, Field(ge=0, le=1)] | None = (
        None  #: relative standard deviation between devices and steps
    )
    error: Annotated[float, Field(ge=0, le=1)] = 0.1
    sources: dict[str, str] = {}

    def to_yaml(self) -> str:
        return dump_values(self.model_dump(mode="json", exclude_none=True))

    @model_validator(mode="after")
    def _whole(self) -> DeviceProfile:
        if (self.backward_ms or 0) + (self.update_ms or 0) >= self.microbatch_ms:
            raise ValueError("backward_ms and update_ms are parts of microbatch_ms: expected less together")
        return self


def figures(profile: BaseModel, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers that a profile gives, by name: `between.latency_us`."""
    for name in profile.model_fields_set:
        value = getattr(profile, name)
        if isinstance(value, BaseModel):
            yield from figures(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and value is not None:
            yield f"{prefix}{name}", value


def shipped(kind: Literal["clusters", "devices"]) -> list[str]:
    return sorted(file.name[:-5] for file in _folder(kind).iterdir() if file.name.endswith(".yaml"))


def load_cluster(name_or_path: str) -> ClusterProfile:
    """A shipped profile or a YAML file; UserError in one line that names the field."""
    return make_profile(ClusterProfile, *_values(name_or_path, "clusters", "cluster profile"))


def load_device(name_or_path: str) -> DeviceProfile:
    return make_profile(DeviceProfile, *_values(name_or_path, "devices", "device profile"))


def make_profile(kind: type[Profile], values: Mapping[str, Any], source: str) -> Profile:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            raise UserError(f"{source}: unknown field {name!r}{_nearest_field(kind, first['loc'])}") from None
        message = _EXPECTED.get(first["type"], message.replace("Input should be", "expected a value"))
        if first["type"] == "missing":
            raise UserError(f"{source}: {name} is missing") from None
        said = f"{name} = {str(first['input'])[:60]}: " if name else ""
        raise UserError(f"{source}: {said}{short_numbers(message)}") from None


def _nearest_field(kind: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    fields = LinkProfile.model_fields if len(loc) > 1 else kind.model_fields
    return nearest(str(loc[-1]), fields)


def _values(name: str, kind: Literal["clusters", "devices"], what: str) -> tuple[dict[str, Any], str]:
    if name in shipped(kind):
        return parse_values((_folder(kind) / f"{name}.yaml").read_text("utf-8"), name, what), f"{what} {name}"
    path = Path(name).expanduser()
    if not os.path.exists(path):
        raise UserError(
            f"{what} {name!r} is neither one of {', '.join(shipped(kind))} nor a YAML file"
            f"{nearest(name, shipped(kind))}"
        )
    return parse_values(read_text(path, what), name, what), f"{what} {name}"


def _folder(kind: str) -> Any:
    return resources.files("hvd_lb") / "forecast" / kind
