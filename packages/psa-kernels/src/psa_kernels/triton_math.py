"""Products that kernels of several operators share."""

import triton
import triton.language as tl


@triton.jit
def dot_rows(x, y, PRECISION: tl.constexpr):
    """``x @ y.T`` of rows ``[M, D]`` and ``[N, D]``.

    In float32 (``PRECISION`` "ieee") a product adds its terms one after another, so that its rounding grows with their
    number and running sum, and that is what decides how exact a score is. So there it is the sum of up to eight
    products, each over every eighth feature.
    """
    # A dot product of Triton's has 16 terms at least.
    PARTS: tl.constexpr = min(8, x.shape[1] // 16) if PRECISION == "ieee" else 1
    return _dot_in_parts(x, y, PARTS, PRECISION)


@triton.jit
def _dot_in_parts(x, y, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    if PARTS == 1:
        product = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    else:
        HALF: tl.constexpr = x.shape[1] // 2
        even_x, odd_x = tl.split(tl.reshape(x, (x.shape[0], HALF, 2)))
        even_y, odd_y = tl.split(tl.reshape(y, (y.shape[0], HALF, 2)))
        product = _dot_in_parts(even_x, even_y, PARTS // 2, PRECISION)
        product += _dot_in_parts(odd_x, odd_y, PARTS // 2, PRECISION)
    return product
