"""Print the GPUs of the CUDA driver as JSON. `gpus` runs this file in a process of its own, without site-packages.

    {"gpus": [{"name": "NVIDIA H100 80GB HBM3", "memory": 84926529536, "compute_capability": [9, 0]}]}
    {"problem": "cuInit: system not yet initialized (802)"}

The driver lists the GPUs as torch will: by CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER (the default is the fastest first),
with MIG devices, and with the machine's memory where a GPU shares it. After cuInit a process's forks cannot use CUDA, which
is why the process that asks does not call it.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys

LIBRARY = "libcuda.so.1"
SECONDS = 60  # that the driver may take; without persistence mode it initialises each GPU first
COMPUTE_CAPABILITY = (75, 76)  # major and minor: CUdevice_attribute in cuda.h


class CudaError(Exception):
    """A call of the driver that failed."""


def read_gpus(cuda: ctypes.CDLL) -> list[dict]:
    """List name, bytes of memory and compute capability of every GPU, in the driver's order.

    Raises:
        CudaError: the driver does not work.
    """
    _call(cuda, "cuInit", 0)
    return [_gpu(cuda, index) for index in range(_number(cuda, "cuDeviceGetCount"))]


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
    """Print the answer; the kernel ends this process when the driver takes longer."""
    signal.alarm(seconds)
    try:
        answer = {"gpus": read_gpus(ctypes.CDLL(LIBRARY))}
    except CudaError as error:
        answer = {"problem": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(int(sys.argv[1]))
