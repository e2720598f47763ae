"""What the stand-in libraries have counted in this process."""

import ctypes

RUNTIME = (
    "launches",
    "stream_syncs",
    "event_syncs",
    "device_syncs",
    "to_device",
    "to_host",
    "in_device",
    "to_device_bytes",
    "to_host_bytes",
    "in_device_bytes",
    "mallocs",
    "memsets",
    "refused_launches",
)  # libraries/cudart.cc, Counters


def reset() -> None:
    """Count from 0."""
    ctypes.CDLL("libcudart.so.13").fakecuda_reset()
    ctypes.CDLL("libcublas.so.13").fakecublas_reset()


def read() -> dict[str, float]:
    """Launches, waits, copies and their bytes; products of matrices and their FLOP."""
    runtime, products = ctypes.CDLL("libcudart.so.13"), ctypes.CDLL("libcublas.so.13")
    values = (ctypes.c_uint64 * len(RUNTIME))()
    runtime.fakecuda_counters(values)
    products.fakecublas_flops.restype = ctypes.c_double
    products.fakecublas_products.restype = ctypes.c_uint64
    counted = dict(zip(RUNTIME, values)) | {"products": products.fakecublas_products()}
    return counted | {"flop": products.fakecublas_flops()}


def waits(counted: dict[str, float]) -> float:
    """How often the host has waited for the device."""
    return sum(counted[key] for key in ("stream_syncs", "event_syncs", "device_syncs"))
