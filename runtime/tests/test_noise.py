import numpy as np
import pytest
from tiue_runtime.errors import RequestError
from tiue_runtime.noise import gaussian

# The values of torch.randn on CUDA with seed 0. They are published, not computed here.
SEED_0 = [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564]


def test_seed_zero_begins_as_on_a_gpu():
    np.testing.assert_allclose(gaussian(0, (6,)), SEED_0, rtol=0, atol=1e-6)


def test_values_depend_on_seed_and_element_only():
    np.testing.assert_array_equal(gaussian(3, (4, 5, 6)).ravel(), gaussian(3, (500,))[:120])
    assert gaussian(3, (4, 5, 6)).dtype == np.float32


def test_both_words_of_the_seed_count():
    firsts = {float(gaussian(seed, (1,))[0]) for seed in (0, 1, 2**32, 2**32 + 1, 2**64 - 1)}
    assert len(firsts) == 5


def test_is_standard_normal():
    values = gaussian(2**63, (1_000_000,)).astype(np.float64)
    moments = [values.mean(), values.var(), (values**3).mean(), (values**4).mean()]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.02)  # five standard errors of the fourth


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", True, None])
def test_refuses_values_that_are_not_seeds(seed):
    with pytest.raises(RequestError, match=r"seed: expected an integer in \[0, 2\*\*64\), got"):
        gaussian(seed, (1,))


def test_takes_numpy_integers():
    np.testing.assert_array_equal(gaussian(np.int64(7), (3,)), gaussian(7, (3,)))
