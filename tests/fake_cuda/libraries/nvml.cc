// NVML: what the doctor asks. build.py adds the other functions that pynvml knows, which are not supported.
// FAKENVML_DRIVER: the driver's version. FAKENVML_WITHOUT_MEMORY: as on GPUs that share the machine's memory.
#include <cstdint>
#include <cstdio>

#include "settings.h"

namespace {
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, DRIVER_NOT_LOADED = 9 };
constexpr unsigned long long MIB = 1 << 20;
constexpr unsigned LINKS = 18;  // of NVLink
struct Memory {
    unsigned long long total, free, used;
};
struct MemoryV2 {
    unsigned version;
    unsigned long long total, reserved, free, used;
};
unsigned long long total() { return settings::memory() + 480 * MIB; }  // with what the driver keeps for itself
int text(char* out, unsigned size, const char* value) {
    snprintf(out, size, "%s", value);
    return SUCCESS;
}
int value(unsigned* out, unsigned given) {
    *out = given;
    return SUCCESS;
}
}  // namespace

extern "C" {
const char* nvmlErrorString(int) { return "an error of the stand-in NVML"; }
int nvmlInit_v2() { return settings::devices() ? SUCCESS : DRIVER_NOT_LOADED; }
int nvmlInitWithFlags(unsigned) { return nvmlInit_v2(); }
int nvmlShutdown() { return SUCCESS; }
int nvmlSystemGetDriverVersion(char* out, unsigned size) {
    return text(out, size, settings::text("FAKENVML_DRIVER", "580.95.05"));
}
int nvmlSystemGetCudaDriverVersion_v2(int* version) {
    *version = settings::cuda_version();
    return SUCCESS;
}
int nvmlDeviceGetCount_v2(unsigned* count) { return value(count, settings::devices()); }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
    if ((int)index >= settings::devices()) return INVALID_ARGUMENT;
    *device = (void*)(uintptr_t)(index + 1);
    return SUCCESS;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char* id, void** device) {
    unsigned domain = 0, bus = 0;
    sscanf(id, "%x:%x", &domain, &bus);
    return nvmlDeviceGetHandleByIndex_v2(bus - 1, device);
}
int nvmlDeviceGetIndex(void* device, unsigned* index) { return value(index, (uintptr_t)device - 1); }
int nvmlDeviceGetUUID(void* device, char* out, unsigned size) {
    snprintf(out, size, "GPU-%08d-0000-0000-0000-000000000000", (int)(uintptr_t)device);
    return SUCCESS;
}
int nvmlDeviceGetName(void*, char* out, unsigned size) { return text(out, size, settings::name()); }
int nvmlDeviceGetMemoryInfo(void*, Memory* memory) {
    if (getenv("FAKENVML_WITHOUT_MEMORY")) return NOT_SUPPORTED;
    *memory = {total(), total() - 600 * MIB, 600 * MIB};
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo_v2(void*, MemoryV2* memory) {
    if (getenv("FAKENVML_WITHOUT_MEMORY")) return NOT_SUPPORTED;
    *memory = {memory->version, total(), 0, total() - 600 * MIB, 600 * MIB};
    return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(void*, int* major, int* minor) {
    *major = settings::capability() / 10, *minor = settings::capability() % 10;
    return SUCCESS;
}
int nvmlDeviceGetNvLinkState(void*, unsigned link, unsigned* state) {
    return link < LINKS ? value(state, 1) : INVALID_ARGUMENT;
}
int nvmlDeviceGetMaxPcieLinkGeneration(void*, unsigned* out) { return value(out, 5); }
int nvmlDeviceGetCurrPcieLinkGeneration(void*, unsigned* out) { return value(out, 5); }
int nvmlDeviceGetMaxPcieLinkWidth(void*, unsigned* out) { return value(out, 16); }
int nvmlDeviceGetCurrPcieLinkWidth(void*, unsigned* out) { return value(out, 16); }
int nvmlDeviceGetGpuFabricInfoV(void*, void*) { return SUCCESS; }  // left as torch has cleared it: no fabric
int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* count, void*) { return value(count, 0); }  // torch asks this
int nvmlDeviceGetComputeRunningProcesses_v3(void*, unsigned* count, void*) { return value(count, 0); }
}
