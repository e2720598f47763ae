"""Print the GPUs of the CUDA driver as JSON. `gpus` runs this file in a process of its own, without site-packages.

    python -I -S cuda_driver.py 60      SECONDS that the driver may take; without persistence mode it initialises each GPU first
    {"cuda": [13, 0], "gpus": [{"name": "NVIDIA H100 80GB HBM3", "memory": 84926529536, "compute_capability": [9, 0]}]}
    {"problem": "cuInit: system not yet initialized (802)"}

    python cuda_driver.py               the build of torch that fits, for `make setup TORCH_INDEX=auto`
    cu126

The driver lists the GPUs as torch will: by CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER (the default is the fastest first),
with MIG devices, and with the machine's memory where a GPU shares it. After cuInit a process's forks cannot use CUDA, which
is why the process that asks does not call it.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from collections.abc import Iterable, Sequence

LIBRARY = "libcuda.so.1"
SECONDS = 60
COMPUTE_CAPABILITY = (75, 76)  # major and minor: CUdevice_attribute in cuda.h
# Torch's builds for CUDA, the newest first: the oldest CUDA version of a driver (any driver of the same major version runs
# it, by NVIDIA's minor version compatibility: 580 and newer, 525 and newer), and the oldest and newest compute capability
# with kernels. Torch 2.13 has these and cu132; 2.15 drops cu126.
TORCH_BUILDS = {"cu130": ((13, 0), (7, 5), (12, 9)), "cu126": ((12, 0), (5, 0), (9, 0))}


class CudaError(Exception):
    """A call of the driver that failed."""


def read() -> dict:
    """List name, bytes of memory and compute capability of every GPU, in the driver's order, and the driver's CUDA version.

    Raises:
        CudaError: the driver does not work. OSError: there is none.
    """
    cuda = ctypes.CDLL(LIBRARY)
    _call(cuda, "cuInit", 0)
    version = _number(cuda, "cuDriverGetVersion")  # 12040 is 12.4
    gpus = [_gpu(cuda, index) for index in range(_number(cuda, "cuDeviceGetCount"))]
    return {"cuda": [version // 1000, version % 1000 // 10], "gpus": gpus}


def torch_build(cuda: Sequence[int], capabilities: Iterable[Sequence[int]]) -> str | None:
    """The newest build of torch that runs on a driver and on all GPUs; None: it takes a newer driver."""
    needed = [tuple(capability) for capability in capabilities]
    for name, (driver, oldest, newest) in TORCH_BUILDS.items():
        if tuple(cuda) >= driver and all(oldest <= capability <= newest for capability in needed):
            return name
    return None


def _gpu(cuda: ctypes.CDLL, index: int) -> dict:
    device, name, memory = _number(cuda, "cuDeviceGet", index), ctypes.create_string_buffer(256), ctypes.c_size_t()
    _call(cuda, "cuDeviceGetName", name, len(name), device)
    _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    capability = [_number(cuda, "cuDeviceGetAttribute", attribute, device) for attribute in COMPUTE_CAPABILITY]
    return {"name": name.value.decode(), "memory": memory.value, "compute_capability": capability}


def _number(cuda: ctypes.CDLL, function: str, *args: int) -> int:
    number = ctypes.c_int()
    _call(cuda, function, ctypes.byref(number), *args)
    return number.value


def _call(cuda: ctypes.CDLL, function: str, *args: object) -> None:
    if code := getattr(cuda, function)(*args):
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))  # leaves it at None for a code that it does not know
        raise CudaError(f"{function}: {(text.value or b'unknown error').decode()} ({code})")


def main(seconds: int) -> None:
    """Print the GPUs; the kernel ends this process when the driver takes longer."""
    signal.alarm(seconds)
    try:
        answer = read()
    except CudaError as error:
        answer = {"problem": str(error)}
    print(json.dumps(answer))


def print_build() -> None:
    """Print the build of torch that fits; exits with 1 where none does."""
    try:
        answer = read()
    except (CudaError, OSError) as error:
        sys.exit(f"TORCH_INDEX=auto: no GPU can be used here ({error}); without GPUs take TORCH_INDEX=cpu")
    build = torch_build(answer["cuda"], [gpu["compute_capability"] for gpu in answer["gpus"]])
    print(build or sys.exit("TORCH_INDEX=auto: no build of torch fits the driver and the GPUs; update the driver"))


if __name__ == "__main__":
    main(int(sys.argv[1])) if len(sys.argv) > 1 else print_build()
