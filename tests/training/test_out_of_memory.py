"""Being out of memory is told from other errors by what the libraries say, and ends with its own exit code."""

import pytest
import torch

from manyrank.errors import EXIT_FAILED, EXIT_MEMORY, is_out_of_memory
from manyrank.topology.ranks import Topology
from manyrank.training.exits import run_with_exit_codes

ASYNC = "\nCUDA kernel errors might be asynchronously reported at some other API call"
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.29.7\n"
CUDA_CALL = f"{NCCL}ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
CUBLAS = "CUDA error: CUBLAS_STATUS_{} when calling `cublasCreate(handle)`"

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"),
    torch.AcceleratorError(f"CUDA error: out of memory{ASYNC}"),
    RuntimeError(f"CUDA error: out of memory{ASYNC}"),
    RuntimeError("CUDA driver error: out of memory"),  # of expandable segments
    RuntimeError(CUBLAS.format("ALLOC_FAILED")),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    torch.distributed.DistBackendError(f"{CUDA_CALL}Cuda failure 2 'out of memory'"),
    torch.distributed.DistBackendError(f"{CUDA_CALL}Cuda failure 'out of memory'"),
    torch.distributed.DistBackendError(f"{CUDA_CALL}Failed to CUDA calloc async 608 bytes"),
    torch.distributed.DistBackendError(f"{CUDA_CALL}Failed to CUDA malloc 6291456 bytes"),
    RuntimeError("Error out of memory at line 380 in file /src/csrc/ops.cu"),  # bitsandbytes
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 1024.00 MiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    ),
    RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1131'),
]
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError(f"CUDA error: device-side assert triggered{ASYNC}"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError(CUBLAS.format("NOT_INITIALIZED")),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    torch.distributed.DistBackendError(f"{CUDA_CALL}Cuda failure 999 'unknown error'"),
    torch.distributed.DistBackendError("NCCL error in: ..., remote process exited or there was a network error"),
    RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376"),  # a Triton kernel's
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than 1EB memory."),  # a size below zero
    RuntimeError("The size of tensor a (8) must match the size of tensor b (4) at non-singleton dimension 0"),
    ValueError("a row says: CUDA out of memory in my notebook"),
    OSError(28, "No space left on device"),
    KeyError("memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[-40:])
def test_out_of_memory(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[-40:])
def test_other_errors(error):
    assert not is_out_of_memory(error)


def test_out_of_memory_anywhere_in_a_worker_has_its_exit_code(capsys):
    """Also while the model is loaded, where nothing compares it with the plan."""

    def work():
        raise OUT_OF_MEMORY[0]

    assert run_with_exit_codes(work, Topology()) == EXIT_MEMORY
    assert capsys.readouterr().err.splitlines()[0].startswith("error: out of memory: CUDA out of memory. Tried to")


def test_another_error_has_its_traceback(capsys):
    def work():
        raise OTHERS[0]

    assert run_with_exit_codes(work, Topology()) == EXIT_FAILED
    assert "Traceback" in capsys.readouterr().err
