"""The algebra on factors equals the same algebra on dense float64 matrices."""

import numpy as np
import pytest
import torch

from helpers import delta, random_update
from merge.factors import Factors, pad, recompress, svd

# Square, wide, tall, of full rank, and with more columns than the update has rank.
SHAPES = [(20, 4, 30), (30, 4, 20), (12, 12, 12), (6, 10, 30), (30, 10, 6), (3, 9, 3), (5, 1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_is_that_of_the_dense_update(shape):
    factors = random_update(*shape, seed=8)
    u, s, vh = svd(factors)
    k = min(shape)
    assert (u.shape, s.shape, vh.shape) == ((shape[0], k), (k,), (k, shape[2]))
    np.testing.assert_allclose(s, np.linalg.svd(delta(factors), compute_uv=False)[:k], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose((u * s) @ vh, delta(factors), atol=1e-4)
    np.testing.assert_allclose(u.T @ u, np.eye(k), atol=1e-5)
    np.testing.assert_allclose(vh @ vh.T, np.eye(k), atol=1e-5)


def test_recompressed_and_padded_factors():
    assert not delta(recompress(Factors(torch.zeros(3, 8), torch.zeros(5, 3)), 2)).any()
    one = random_update(20, 4, 30, seed=0)
    wide = pad(one, 9)
    assert wide.a.shape == (9, 30) and wide.b.shape == (20, 9) and (delta(wide) == delta(one)).all()
    with pytest.raises(ValueError, match="4 to 3"):
        pad(one, 3)
