// What the stand-in machine is, from the environment: FAKECUDA_DEVICES, _MEMORY_MIB, _NAME, _CAPABILITY, ...
#pragma once
#include <cstdlib>
#include <cstring>

namespace settings {
inline long number(const char* name, long otherwise) {
    const char* value = getenv(name);
    return value ? atol(value) : otherwise;
}
inline const char* text(const char* name, const char* otherwise) {
    const char* value = getenv(name);
    return value ? value : otherwise;
}
inline int devices() { return number("FAKECUDA_DEVICES", 1); }
inline size_t memory() { return (size_t)number("FAKECUDA_MEMORY_MIB", 81079) << 20; }
inline const char* name() { return text("FAKECUDA_NAME", "NVIDIA H100 80GB HBM3"); }
inline int capability() { return number("FAKECUDA_CAPABILITY", 90); }  // 80 for (8, 0)
inline int cuda_version() { return 13000; }
// Bytes up to which copies and messages are real; above it memory is address space that nobody touches.
inline size_t real_bytes() { return number("FAKECUDA_REAL_BYTES", 8 << 20); }
}  // namespace settings
