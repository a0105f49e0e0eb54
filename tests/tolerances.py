"""Every tolerance of the tests, with its reason."""

# The same float32 sums in another order (batched or not, closed form or step by step); values of order 1.
REORDERED = 1e-5

# A golden picture's latents through ONNX Runtime: kernels differ too. 6e-6 is usual, and no eye sees 1e-3.
GOLDEN_LATENTS = 1e-3

# Levels of 255: rounding to 8 bits can fall either way.
GOLDEN_IMAGE_LEVELS = 1
