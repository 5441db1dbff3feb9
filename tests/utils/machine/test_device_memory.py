"""Memory that runs out is recognised, and what does not fit is done in smaller parts."""

from itertools import chain

import pytest
import torch

from utils.machine.device_memory import FittingParts, is_out_of_memory

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:30])
def test_what_torch_and_cudas_libraries_say_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: invalid device ordinal"), ValueError("out of memory")])
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)


def full_above(most: int, seen: list[int]):
    def work(part):
        seen.append(len(part))
        if len(part) > most:
            raise OUT_OF_MEMORY[0]
        return list(part)

    return work


def test_a_part_that_does_not_fit_is_done_again_in_halves_and_nothing_is_lost():
    seen, parts = [], FittingParts(8)
    assert [*chain(*parts.of(range(10), full_above(2, seen)))] == [*range(10)]
    assert seen == [8, 4, 2, 2, 2, 2, 2]
    assert [*chain(*parts.of(range(3), full_above(2, seen)))] == [0, 1, 2]
    assert seen[7:] == [2, 1]  # the next sequence starts with what fitted


def test_a_limit_of_one_sequence_does_not_bind_the_next():
    seen, parts = [], FittingParts()
    assert len([*parts.of(range(6), full_above(99, seen), 2)]) == 3
    assert len([*parts.of(range(6), full_above(99, seen))]) == 1
    assert seen == [2, 2, 2, 6]


@pytest.mark.parametrize(("most", "survives"), [(0, True), (1, False)])
def test_one_item_that_does_not_fit_raises_and_so_does_any_where_others_wait(most, survives):
    with pytest.raises(torch.OutOfMemoryError):
        [*FittingParts(4, survives).of(range(4), full_above(most, []))]


def test_another_error_is_left_as_it_is():
    def work(part):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"):
        [*FittingParts(4).of(range(4), work)]
