"""Every numeric tolerance of the test suite, with its reason."""

# fp32 gradients, batched against one by one: sums over t tokens in another order; a few units of
# 2^-24 times the largest entry
GRADIENT_RTOL = 1e-4
GRADIENT_ATOL = 2e-6

# norms and losses are sums of many such terms
NORM_RTOL = 1e-4
LOSS_RTOL = 1e-5

# fp32 rows of the same examples in other batches
ROW_COSINE = 0.99999

# a model in bf16 against itself in fp32: 8 bits of mantissa in weights and activations
BF16_COSINE = 0.99
BF16_NORM_RTOL = 0.05

# an estimate over n independent maps lies within this many standard errors of its mean (fixed
# seeds, so no flakiness)
STANDARD_ERRORS = 4.0

# the variance of a projected inner product against the Johnson-Lindenstrauss bound, which is an
# upper bound for any pair of vectors
VARIANCE_SLACK = 1.3

# Adam directions against numbers printed with 5 digits
ADAM_ATOL = 2e-5

# fp32 on a GPU against a CPU: other kernels, and other orders of the sums over features as well as
# tokens
GPU_RTOL = 1e-3
GPU_ATOL = 1e-5
