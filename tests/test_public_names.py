"""What `import hvd_lb` offers, before anything of it is used."""

import subprocess
import sys

import hvd_lb


def test_every_public_name_is_listed_and_there() -> None:
    assert set(hvd_lb.__all__) < set(dir(hvd_lb))
    for name in hvd_lb.__all__:
        assert getattr(hvd_lb, name).__name__ == name


def test_looking_imports_no_torch() -> None:
    program = "import sys, hvd_lb; assert 'init' in dir(hvd_lb); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
