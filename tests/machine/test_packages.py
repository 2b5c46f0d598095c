"""Which versions were tried."""

import pytest

from hvd_lb.machine import packages


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"torch": "2.15.0+cu132", "torchvision": "0.29.2"}, []),
        ({"torch": "2.9.1+cu128", "torchvision": "0.24.1"}, []),
        ({"torch": "2.16.0", "torchvision": "0.29.2"}, ["torch 2.16.0"]),
        ({"torch": "3.0.0.dev1+cpu", "torchvision": "0.30.0a0"}, ["torch 3.0.0.dev1+cpu", "torchvision 0.30.0a0"]),
        ({}, []),
    ],
)  # fmt: skip
def test_newer_than_any_that_was_tried(
    installed: dict[str, str], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "version", installed.get)
    assert packages.untried() == said
