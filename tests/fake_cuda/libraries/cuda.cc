// The driver's interface, over the stand-in runtime: what torch, Triton and manyrank ask of it. build.py adds the other
// functions of cuda.h, which do nothing and succeed.
#include <cuda.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>

#include "settings.h"

namespace {
// The runtime is preloaded, except in a process that only asks which GPUs there are.
template <class... Args>
int runtime(const char* name, Args... args) {
    auto function = (int (*)(Args...))dlsym(RTLD_DEFAULT, name);
    return function ? function(args...) : CUDA_ERROR_NOT_SUPPORTED;
}
struct Allocation {
    size_t bytes;
    int device;
};
}  // namespace

extern "C" {
// Devices
CUresult cuInit(unsigned) { return settings::devices() ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }
CUresult cuDriverGetVersion(int* version) {
    *version = settings::cuda_version();
    return CUDA_SUCCESS;
}
CUresult cuGetProcAddress_v2(const char* symbol, void** function, int, cuuint64_t,
                             CUdriverProcAddressQueryResult* result) {
    static void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    *function = dlsym(driver, symbol);
    if (result) *result = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return CUDA_SUCCESS;
}
// NVRTC 13 calls what it finds in such a table
CUresult cuGetExportTable(const void** table, const CUuuid*) {
    *table = nullptr;
    return CUDA_ERROR_NOT_FOUND;
}
CUresult cuDeviceGetCount(int* count) {
    if (runtime("cudaGetDeviceCount", count) == CUDA_ERROR_NOT_SUPPORTED) *count = settings::devices();
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* name, int size, CUdevice) {
    snprintf(name, size, "%s", settings::name());
    return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) {
    *bytes = settings::memory();
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    int error = runtime("cudaDeviceGetAttribute", value, (int)attribute, (int)device);
    if (error != CUDA_ERROR_NOT_SUPPORTED) return (CUresult)error;
    int capability = settings::capability();
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? capability / 10
             : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? capability % 10
                                                                         : 0;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    *context = (CUcontext)(uintptr_t)(device + 1);
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = (CUcontext)1;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) { return (CUresult)runtime("cudaGetDevice", (int*)device); }
CUresult cuStreamGetCtx(CUstream, CUcontext* context) { return cuCtxGetCurrent(context); }
CUresult cuGetErrorString(CUresult, const char** text) {
    *text = "an error of the stand-in driver";
    return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** text) { return cuGetErrorString(error, text); }
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr*)value = pointer;
    else
        *(int*)value = attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE ? CU_MEMORYTYPE_DEVICE : 0;
    return CUDA_SUCCESS;
}

// Kernels that Triton or NVRTC has compiled
CUresult cuModuleLoadData(CUmodule* module, const void*) {
    *module = (CUmodule)calloc(1, 64);
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
    return cuModuleLoadData(module, image);
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
    *function = (CUfunction)strdup(name);
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
             : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 64
                                                                  : 0;
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                        void**, void**) {
    return (CUresult)runtime("fakecuda_count_launch");
}
CUresult cuLaunchKernelEx(const CUlaunchConfig*, CUfunction, void**, void**) {
    return (CUresult)runtime("fakecuda_count_launch");
}
CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
    *clusters = 8;
    return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int, size_t) {
    *blocks = 2;
    return CUDA_SUCCESS;
}

// Expandable segments: address space first, memory for pieces of it later
CUresult cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
    *bytes = 2 << 20;
    return CUDA_SUCCESS;
}
CUresult cuMemAddressReserve(CUdeviceptr* at, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
    void* space = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *at = (CUdeviceptr)space;
    return space == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
CUresult cuMemAddressFree(CUdeviceptr at, size_t bytes) {
    munmap((void*)at, bytes);
    return CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp* properties,
                     unsigned long long) {
    int device = properties->location.id;
    if (!runtime("fakecuda_take", bytes, device)) return CUDA_ERROR_OUT_OF_MEMORY;
    *handle = (CUmemGenericAllocationHandle)(uintptr_t) new Allocation{bytes, device};
    return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    auto* allocation = (Allocation*)(uintptr_t)handle;
    runtime("fakecuda_give", allocation->bytes, allocation->device);
    delete allocation;
    return CUDA_SUCCESS;
}
CUresult cuMemMap(CUdeviceptr at, size_t bytes, size_t, CUmemGenericAllocationHandle handle, unsigned long long) {
    runtime("fakecuda_map", (void*)at, bytes, ((Allocation*)(uintptr_t)handle)->device);
    return CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr at, size_t bytes) {
    runtime("fakecuda_unmap", (void*)at);
    madvise((void*)at, bytes, MADV_DONTNEED);
    return CUDA_SUCCESS;
}
}
