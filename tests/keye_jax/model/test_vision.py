"""The resized position table against torch's bilinear interpolation, written out in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.model.vision import interpolate_positions


def resize(table, height, width):
    """Bilinear, corners not aligned, no antialias, one axis after the other."""

    def axis_weights(size, base):
        weights = np.zeros((size, base))
        for i in range(size):
            x = min(max((i + 0.5) * base / size - 0.5, 0.0), base - 1)
            low = int(x)
            weights[i, low] += 1 - (x - low)
            weights[i, min(low + 1, base - 1)] += x - low
        return weights

    base = table.shape[0]
    return np.einsum("hr,wc,rcd->hwd", axis_weights(height, base), axis_weights(width, base), table)


@pytest.mark.parametrize(("height", "width"), [(27, 27), (2, 2), (12, 40), (56, 6), (1, 100)])
def test_positions_are_interpolated_as_torch_does(height, width):
    table = np.random.default_rng(0).normal(size=(27, 27, 5)).astype(np.float32)
    index = np.arange(height * width)[None]
    got = interpolate_positions(
        jnp.asarray(table.reshape(-1, 5)),
        jnp.asarray(index // width),
        jnp.asarray(index % width),
        jnp.asarray([[height, width]]),
    )
    np.testing.assert_allclose(np.asarray(got).reshape(height, width, 5), resize(table, height, width), atol=1e-5)
