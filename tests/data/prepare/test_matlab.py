"""The MAT-file reader against SciPy's writer."""

from __future__ import annotations

import io

import numpy as np
import pytest

from hvd_lb.data.prepare.matlab import read_structs

savemat = pytest.importorskip("scipy.io").savemat


def synsets(count: int) -> np.ndarray:
    array = np.empty((count, 1), [(name, object) for name in ("ID", "WNID", "words", "children", "inner")])
    for i in range(count):
        inner = np.array([(i, "x")], [("a", object), ("b", object)])
        array[i, 0] = (i + 1, f"n{i:08d}", "a" * i + "é", np.arange(i, dtype=np.float64), inner)
    return array


@pytest.mark.parametrize("compressed", [True, False])
def test_what_scipy_writes_is_read(compressed: bool) -> None:
    file = io.BytesIO()
    savemat(file, {"before": np.eye(3), "text": "x", "synsets": synsets(9)}, do_compression=compressed)
    read = read_structs(file.getvalue())
    assert [int(fields["ID"][0]) for fields in read] == list(range(1, 10))
    assert [fields["WNID"] for fields in read] == [f"n{i:08d}" for i in range(9)]
    assert [fields["words"] for fields in read] == ["a" * i + "é" for i in range(9)]
    assert [np.asarray(fields["children"]).tolist() for fields in read] == [list(range(i)) for i in range(9)]


def test_other_files_are_refused() -> None:
    file = io.BytesIO()
    savemat(file, {"numbers": np.eye(3)})
    with pytest.raises(ValueError, match="no array of structs"):
        read_structs(file.getvalue())
    savemat(whole := io.BytesIO(), {"synsets": synsets(9)})
    for content in (b"", b"text" * 100, whole.getvalue()[:300]):
        with pytest.raises(ValueError, match="MAT-file"):
            read_structs(content)
