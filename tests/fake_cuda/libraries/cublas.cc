// Matrix products that are noted and not computed. build.py adds the other functions, which do nothing and succeed.
#include <cublas_v2.h>

#include <cstdint>
#include <mutex>

#include "settings.h"

namespace {
std::mutex lock;
double flops;
uint64_t products;
}  // namespace

extern "C" {
void fakecublas_note(long m, long n, long k, long batch) {
    std::lock_guard<std::mutex> guard(lock);
    products++;
    flops += 2.0 * m * n * k * batch;
}
double fakecublas_flops() { return flops; }
uint64_t fakecublas_products() { return products; }
void fakecublas_reset() {
    std::lock_guard<std::mutex> guard(lock);
    flops = products = 0;
}

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
    *handle = (cublasHandle_t)calloc(1, 4096);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
    *mode = CUBLAS_DEFAULT_MATH;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetVersion_v2(cublasHandle_t, int* version) {
    *version = 130101;
    return CUBLAS_STATUS_SUCCESS;
}
const char* cublasGetStatusString(cublasStatus_t) { return "an error of the stand-in"; }
const char* cublasGetStatusName(cublasStatus_t) { return "an error of the stand-in"; }
cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k, const void*,
                            const void*, cudaDataType, int, const void*, cudaDataType, int, const void*, void*,
                            cudaDataType, int, cublasComputeType_t, cublasGemmAlgo_t) {
    fakecublas_note(m, n, k, 1);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k,
                                          const void*, const void*, cudaDataType, int, long long, const void*,
                                          cudaDataType, int, long long, const void*, void*, cudaDataType, int,
                                          long long, int batch, cublasComputeType_t, cublasGemmAlgo_t) {
    fakecublas_note(m, n, k, batch);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSgemm_v2(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k, const float*,
                              const float*, int, const float*, int, const float*, float*, int) {
    fakecublas_note(m, n, k, 1);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k,
                                         const float*, const float*, int, long long, const float*, int, long long,
                                         const float*, float*, int, long long, int batch) {
    fakecublas_note(m, n, k, batch);
    return CUBLAS_STATUS_SUCCESS;
}
}
