"""A stand-in for the library of the CUDA driver, compiled by a test: it has the GPUs of FAKE_GPUS, and CUDA FAKE_CUDA.

FAKE_GPUS="NVIDIA A100,85899345920,8,0;NVIDIA L4,24696061952,8,9"; FAKE_CUDA=12040; FAKE_CUINIT=999, FAKE_HANG=1 and FAKE_CRASH=1 break it.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
struct gpu { char name[200]; size_t memory; int capability[2]; } gpus[16];
int count;
int cuInit(unsigned flags) {
    if (getenv("FAKE_HANG")) sleep(3600);
    if (getenv("FAKE_CRASH")) abort();
    char *text = strdup(getenv("FAKE_GPUS"));
    for (char *part = strtok(text, ";"); part; part = strtok(NULL, ";"), count++)
        sscanf(part, "%199[^,],%zu,%d,%d", gpus[count].name, &gpus[count].memory, gpus[count].capability, gpus[count].capability + 1);
    return getenv("FAKE_CUINIT") ? atoi(getenv("FAKE_CUINIT")) : count ? 0 : 100;
}
int cuDriverGetVersion(int *version) { *version = getenv("FAKE_CUDA") ? atoi(getenv("FAKE_CUDA")) : 13000; return 0; }
int cuDeviceGetCount(int *result) { *result = count; return 0; }
int cuDeviceGet(int *device, int index) { *device = 40 + index; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, gpus[device - 40].name, length); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = gpus[device - 40].memory; return *bytes ? 0 : 101; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = gpus[device - 40].capability[which - 75]; return 0; }
int cuGetErrorString(int code, const char **text) {
    *text = code == 803 ? "system has unsupported display driver / cuda driver combination" : NULL;
    return *text ? 0 : 1;
}
"""


def build(folder: Path) -> Path:
    """Compile libcuda.so.1 into a folder, for LD_LIBRARY_PATH of a new process."""
    if not shutil.which("gcc"):
        pytest.skip("there is no gcc")
    source = folder / "libcuda.c"
    source.write_text(SOURCE)
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", folder / "libcuda.so.1", source], check=True)
    return folder


def environment(library: Path | None, *gpus: tuple[str, int, tuple[int, int]], **variables: str) -> dict[str, str]:
    """The environment of a process on a machine with these GPUs, as (name, bytes, compute capability)."""
    text = ";".join(f"{name},{memory},{major},{minor}" for name, memory, (major, minor) in gpus)
    environ = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")}
    path = {"LD_LIBRARY_PATH": str(library)} if library else {}
    return {**environ, "FAKE_GPUS": text, **path, **variables}
