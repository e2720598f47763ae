// cuBLASLt: its products are noted with those of cuBLAS, which is preloaded beside it.
#include <cublasLt.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>

namespace {
constexpr size_t OPAQUE = 512;  // at least the size of cublasLt's own structures
struct Layout {
    uint64_t rows, columns;
    int batch;
};
struct Operation {
    int transpose_a;
};
}  // namespace

extern "C" {
cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    *handle = (cublasLtHandle_t)calloc(1, 4096);
    return CUBLAS_STATUS_SUCCESS;
}
size_t cublasLtGetVersion() { return 130101; }
cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, size_t, cudaDataType,
                                                 uint64_t rows, uint64_t columns, int64_t) {
    *(Layout*)layout = {rows, columns, 1};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t leading) {
    *layout = (cublasLtMatrixLayout_t)calloc(1, OPAQUE);
    return cublasLtMatrixLayoutInit_internal(*layout, OPAQUE, type, rows, columns, leading);
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute, const void* value, size_t) {
    if (attribute == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) ((Layout*)layout)->batch = *(int*)value;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    free(layout);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* operation, cublasComputeType_t, cudaDataType_t) {
    *operation = (cublasLtMatmulDesc_t)calloc(1, OPAQUE);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t operation,
                                              cublasLtMatmulDescAttributes_t attribute, const void* value, size_t) {
    if (attribute == CUBLASLT_MATMUL_DESC_TRANSA) ((Operation*)operation)->transpose_a = *(int*)value;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t operation) {
    free(operation);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    *preference = (cublasLtMatmulPreference_t)calloc(1, OPAQUE);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    free(preference);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t* result,
                                              int* results) {
    *result = {};
    *results = 1;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t operation, const void*, const void*,
                              cublasLtMatrixLayout_t a, const void*, cublasLtMatrixLayout_t, const void*, const void*,
                              cublasLtMatrixLayout_t, void*, cublasLtMatrixLayout_t result,
                              const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t) {
    static auto note = (void (*)(long, long, long, long))dlsym(RTLD_DEFAULT, "fakecublas_note");
    auto *left = (Layout*)a, *product = (Layout*)result;
    long inner = ((Operation*)operation)->transpose_a ? left->rows : left->columns;
    if (note) note(product->rows, product->columns, inner, left->batch);
    return CUBLAS_STATUS_SUCCESS;
}
}
