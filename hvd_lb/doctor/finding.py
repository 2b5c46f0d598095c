"""One line of the table of `hvd-lb doctor`."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line of the table; `required`: without it `hvd-lb train` cannot run here."""

    name: str
    state: State
    detail: str
    fix: str = ""
    required: bool = False

    @property
    def prevents_training(self) -> bool:
        return self.required and self.state != "ok"
