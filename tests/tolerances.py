"""Every tolerance of the tests, with its reason."""

# The same float32 sums in another order (batched or not, closed form or step by step); values of order 1.
REORDERED = 1e-5

# Bytes of the UNet's weights in the files of both halves, relative to the UNet: constants add a little.
WEIGHTS_ONCE = 1.1

# Bytes that graphs for the CPU add to those of the portable graphs: the weights that these keep in float32.
EXTRA_FOR_CPU = 0.2

# PSNR in dB that a graph in int8 stays below: above it, nothing was rounded to 8 bits.
INT8_CEILING_DB = 60

# The outputs of a convolution whose weights have 8 bits (relative to their standard deviation): 0.02 is usual.
EIGHT_BITS = 0.05

# Values of a picture in int8 whose sums were in another order: some activations round the other way.
INT8_REORDERED = 2e-2

# Bytes that a process was measured to take for an array of 128 MiB.
MEASURED_128_MIB = (100e6, 200e6)

# A golden picture's latents through ONNX Runtime: kernels differ too. 6e-6 is usual, and no eye sees 1e-3.
GOLDEN_LATENTS = 1e-3

# Levels of 255: rounding to 8 bits can fall either way.
GOLDEN_IMAGE_LEVELS = 1

# PSNR in dB of latents that another program of ONNX Runtime made: its kernels sum in other orders.
OTHER_RUNTIME_DB = 100

# REORDERED after a difference was multiplied by guidance or by a schedule's weights.
AMPLIFIED = 1e-4

# Losses of one batch cut into micro-batches (relative): other sums, other kernels.
CUT_LOSSES = 1e-4

# Losses after some updates by two processes (relative): Adam amplifies REORDERED where a gradient is nearly zero.
SHARED_LOSSES = 1e-3
SHARED_WEIGHTS = 1e-5
ALMOST_ZERO = 1e-6  # the absolute part of the relative ones

# Text embeddings of captions in another batch.
EMBEDDINGS = 1e-6

# The same embeddings in bfloat16, which has 8 bits.
BFLOAT16 = 1e-2

# Activations by shapes alone (relative): maps of attention, which a fused kernel does not keep, are left out.
ACTIVATIONS = 0.1

# Activations of twice the batch (relative): some do not depend on the batch.
PROPORTIONAL = 0.01

# Frechet distances with a closed form, in float64 through a matrix square root.
FRECHET = 1e-6

# Statistics of 4000 random numbers against those of their distribution (relative).
OF_4000_SAMPLES = 0.1

# Latents of schedulers that subtract two numbers of 4096 in float32 (relative to their standard deviation).
ZERO_SNR = 5e-3

# A GPU's float32 without TF32, and its float16, beside the CPU's float32 (relative root mean square).
GPU_FLOAT32 = 1e-4
GPU_FLOAT16 = 3e-2

# Losses of the first updates on a GPU beside those of the CPU (relative): Adam amplifies what differs.
GPU_LOSSES = 1e-3
