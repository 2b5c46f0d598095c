import numpy as np
import pytest

from hvd_lb.network.alpha_beta import fit

SIZES = [1 << 10, 1 << 15, 1 << 20, 1 << 26]


def test_a_line_is_found_exactly() -> None:
    line = fit(SIZES, [3e-5 + 8e-10 * size for size in SIZES])
    assert line.alpha == pytest.approx(3e-5, rel=1e-9)
    assert line.beta == pytest.approx(8e-10, rel=1e-9)
    assert line.error < 1e-9
    assert line.seconds(1e6) == pytest.approx(3e-5 + 8e-4)


def test_no_other_line_has_smaller_relative_deviations() -> None:
    times = np.array([4e-5, 7e-5, 7e-4, 6.5e-2])
    line = fit(SIZES, times.tolist())

    def error(alpha: float, beta: float) -> float:
        deviations = (alpha + beta * np.array(SIZES)) / times - 1
        return float(np.sqrt(np.mean(deviations**2)))

    assert line.error == pytest.approx(error(line.alpha, line.beta))
    for factor in (0.99, 1.01):
        assert error(factor * line.alpha, line.beta) > line.error
        assert error(line.alpha, factor * line.beta) > line.error


@pytest.mark.parametrize(
    ("times", "alpha", "beta"),
    [([1.0, 1.0, 1.0, 0.5], True, False), ([1e-9 * size**1.2 for size in SIZES], False, True)],
)
def test_no_part_is_negative(times: list[float], alpha: bool, beta: bool) -> None:
    line = fit(SIZES, times)
    assert (line.alpha > 0, line.beta > 0) == (alpha, beta)
    for factor in (0.99, 1.01):  # and what is left is the best
        value = factor * (line.alpha or line.beta)
        model = np.full(4, value) if alpha else value * np.array(SIZES)
        assert float(np.sqrt(np.mean((model / np.array(times) - 1) ** 2))) > line.error


@pytest.mark.parametrize(("sizes", "times"), [([1], [1.0]), ([1, 1], [1.0, 1.0]), ([1, 2], [0.0, 1.0])])
def test_what_is_no_series_is_refused(sizes: list[int], times: list[float]) -> None:
    with pytest.raises(ValueError, match="two sizes"):
        fit(sizes, times)
