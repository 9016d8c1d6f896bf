"""Sums of Gram matrices are those of the definition, whatever the layout and the widths of the blocks."""

import pytest
import torch

from pipeline.compression.products import gram_total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 5, 300])
def test_a_total_is_the_sum_of_the_products(size, dtype):
    torch.manual_seed(0)
    blocks = [torch.randn(size, 7, dtype=dtype), torch.randn(9, size, dtype=dtype).T, torch.randn(size, 1, dtype=dtype)]
    exact = [block.double() @ block.double().T for block in blocks]
    kept = [block.clone() for block in blocks]
    torch.testing.assert_close(gram_total(blocks, size, dtype).double(), sum(exact), atol=1e-5, rtol=1e-5)
    shared = sum(one / one.trace() for one in exact)
    torch.testing.assert_close(gram_total(blocks, size, dtype, even=True).double(), shared, atol=1e-6, rtol=1e-5)
    assert all(map(torch.equal, blocks, kept))


def test_a_block_of_zeros_adds_nothing_where_blocks_count_the_same():
    total = gram_total([torch.zeros(3, 2), torch.eye(3)], 3, torch.float32, even=True)
    torch.testing.assert_close(total, torch.eye(3) / 3)
