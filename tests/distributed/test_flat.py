"""Flat copies of tensors: what goes in comes back, in place."""

import torch

from hf_msn.distributed.comm.flat import FlatTensors, split_into_buckets


def test_values_of_every_dtype_and_layout_come_back_into_the_same_memory():
    tensors = [
        torch.arange(6.0).view(2, 3).T,
        torch.tensor(3.0),
        torch.arange(4),
        torch.ones(2, dtype=torch.bfloat16),
        torch.empty(0),
        torch.full((2, 2), 7.0),
    ]
    places = [tensor.data_ptr() for tensor in tensors]
    flat = FlatTensors(tensors)
    assert [buffer.tolist() for buffer in flat.copy_in()] == [[0, 3, 1, 4, 2, 5, 3, 7, 7, 7, 7], [0, 1, 2, 3], [1, 1]]
    for buffer in flat.buffers:
        buffer.mul_(2)
    assert tensors[0].tolist() == [[0, 3], [1, 4], [2, 5]]  # a copy
    flat.copy_back()
    assert tensors[0].tolist() == [[0, 6], [2, 8], [4, 10]]
    assert (tensors[1].item(), tensors[2].tolist(), tensors[3].tolist()) == (6.0, [0, 2, 4, 6], [2, 2])
    assert [tensor.data_ptr() for tensor in tensors] == places


def test_padding_is_zero_and_stays_out_of_the_tensors():
    tensor = torch.ones(5, requires_grad=True)
    flat = FlatTensors([tensor], multiple_of=4)
    assert flat.copy_in()[0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    flat.buffers[0].fill_(3)
    flat.copy_back()
    assert tensor.tolist() == [3] * 5


def test_buckets_hold_one_dtype_keep_the_order_and_the_limit(monkeypatch):
    monkeypatch.setattr("hf_msn.distributed.comm.flat.BUCKET_BYTES", 120)
    sizes = [10, 20, 5, 100, 1, 2]
    tensors = [torch.empty(n) for n in sizes]
    tensors.insert(1, torch.empty(3, dtype=torch.float64))
    assert split_into_buckets(tensors) == [[0, 2], [1], [3], [4], [5, 6]]


def test_wide_buffers_are_real_and_of_at_least_float32_and_are_divided_before_rounding():
    half, complex_numbers = torch.ones(3, dtype=torch.bfloat16), torch.tensor([1 + 2j, 3 + 4j])
    flat = FlatTensors([half, complex_numbers], widen=True)
    assert [buffer.tolist() for buffer in flat.copy_in()] == [[1, 1, 1], [1, 2, 3, 4]]
    assert {buffer.dtype for buffer in flat.buffers} == {torch.float32}
    flat.copy_back(3.0)
    assert half.tolist() == [torch.tensor(1 / 3).bfloat16().item()] * 3
    torch.testing.assert_close(complex_numbers, torch.tensor([1 + 2j, 3 + 4j]) / 3)
    again = FlatTensors([half, complex_numbers], widen=True, buffers=flat.buffers)
    assert again.copy_in()[0] is flat.buffers[0]
