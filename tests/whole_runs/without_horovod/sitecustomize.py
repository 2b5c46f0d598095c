"""On PYTHONPATH, an interpreter that has no Horovod."""

import sys

sys.modules["horovod"] = None  # type: ignore[assignment]
