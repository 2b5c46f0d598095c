"""setup.cfg names every package and every data file: a folder left out would be missing from an installed hvd-lb."""

import configparser
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_package_is_named(setup: configparser.ConfigParser) -> None:
    folders = {
        path.parent.relative_to(ROOT) for top in ("hvd_lb", "cli") for path in (ROOT / top).rglob("*.py")
    }
    expected = {
        ".".join(folder.parts).replace("cli", "hvd_lb_cli", folder.parts[0] == "cli") for folder in folders
    }
    assert set(setup["options"]["packages"].split()) == expected
    assert [folder for folder in folders if not (ROOT / folder / "__init__.py").exists()] == []


def test_every_data_file_is_named(setup: configparser.ConfigParser) -> None:
    listing = ["git", "-C", str(ROOT), "ls-files", "hvd_lb"]
    tracked = subprocess.run(listing, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a checkout")
    patterns = setup["options.package_data"]["hvd_lb"].split()
    files = [Path(name).relative_to("hvd_lb") for name in tracked if not name.endswith(".py")]
    assert [file for file in files if not any(file.match(pattern) for pattern in patterns)] == []
