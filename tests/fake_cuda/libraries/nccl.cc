// NCCL between processes of this machine, over shared memory. All ranks of a communicator must ask for the same
// operation on as many elements of one type; else every one of them fails. Messages above real_bytes() are agreed on
// and not moved.
#include <fcntl.h>
#include <linux/futex.h>
#include <nccl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "settings.h"

#define OK(signature) \
    ncclResult_t signature { return ncclSuccess; }

namespace {
constexpr size_t SLOT = 1 << 20;  // bytes of a rank's part of the shared memory
constexpr int MOST_RANKS = 64;

enum Operation { ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST };
const char* NAMES[] = {"all_reduce", "all_gather", "reduce_scatter", "broadcast"};

struct Call {
    int operation, type;
    uint64_t elements;
};
struct Shared {
    std::atomic<uint32_t> joined, arrived, phase;
    Call calls[MOST_RANKS];
};
struct Communicator {
    Shared* shared;
    char* slots;
    int ranks, rank;

    char* slot(int of) { return slots + of * SLOT; }
    void wait() {
        uint32_t phase = shared->phase;
        if (shared->arrived.fetch_add(1) + 1 == (uint32_t)ranks) {
            shared->arrived = 0;
            shared->phase.fetch_add(1);
            syscall(SYS_futex, &shared->phase, FUTEX_WAKE, ranks, nullptr, nullptr, 0);
            return;
        }
        // Not by spinning: there are more ranks than cores.
        while (shared->phase == phase) syscall(SYS_futex, &shared->phase, FUTEX_WAIT, phase, nullptr, nullptr, 0);
    }
};

Communicator* of(ncclComm_t communicator) { return (Communicator*)communicator; }

size_t width(int type) {
    switch (type) {
        case ncclFloat16:
        case ncclBfloat16: return 2;
        case ncclInt32:
        case ncclUint32:
        case ncclFloat32: return 4;
        case ncclInt64:
        case ncclUint64:
        case ncclFloat64: return 8;
        default: return 1;
    }
}

bool agree(Communicator* c, Operation operation, size_t elements, int type) {
    static bool traced = getenv("FAKENCCL_TRACE");
    if (traced) fprintf(stderr, "FAKENCCL rank %d: %s of %zu of type %d\n", c->rank, NAMES[operation], elements, type);
    if (c->ranks == 1) return true;
    Call own = {operation, type, elements};
    c->shared->calls[c->rank] = own;
    c->wait();
    bool same = true;
    for (int rank = 0; rank < c->ranks; rank++) {
        Call other = c->shared->calls[rank];
        if (other.operation == operation && other.elements == elements && other.type == type) continue;
        same = false;
        fprintf(stderr, "FAKENCCL rank %d: %s of %zu elements of type %d; rank %d: %s of %lu of type %d\n", c->rank,
                NAMES[operation], elements, type, rank, NAMES[other.operation], other.elements, other.type);
    }
    c->wait();
    return same;
}

float widen(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}
uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits >> 16;
}
template <class T>
void combine_as(void* into, const void* from, size_t elements, int reduction) {
    T* a = (T*)into;
    const T* b = (const T*)from;
    for (size_t i = 0; i < elements; i++)
        a[i] = reduction == ncclMax    ? (a[i] > b[i] ? a[i] : b[i])
               : reduction == ncclMin  ? (a[i] < b[i] ? a[i] : b[i])
               : reduction == ncclProd ? a[i] * b[i]
                                       : a[i] + b[i];
}
void combine(void* into, const void* from, size_t elements, int type, int reduction) {
    switch (type) {
        case ncclInt8: return combine_as<int8_t>(into, from, elements, reduction);
        case ncclUint8: return combine_as<uint8_t>(into, from, elements, reduction);
        case ncclInt32: return combine_as<int32_t>(into, from, elements, reduction);
        case ncclInt64:
        case ncclUint64: return combine_as<int64_t>(into, from, elements, reduction);
        case ncclFloat32: return combine_as<float>(into, from, elements, reduction);
        case ncclFloat64: return combine_as<double>(into, from, elements, reduction);
        case ncclBfloat16: {
            auto *a = (uint16_t*)into, *b = (uint16_t*)from;
            for (size_t i = 0; i < elements; i++) a[i] = narrow(widen(a[i]) + widen(b[i]));
        }
    }
}
void divide(void* values, size_t elements, int type, int by) {
    for (size_t i = 0; i < elements; i++) {
        if (type == ncclFloat32) ((float*)values)[i] /= by;
        if (type == ncclFloat64) ((double*)values)[i] /= by;
        if (type == ncclBfloat16) ((uint16_t*)values)[i] = narrow(widen(((uint16_t*)values)[i]) / by);
    }
}

// Sums (or maxima, ...) over the slots of all ranks, of elements that each has put into its own.
void reduce_slots(Communicator* c, void* into, size_t elements, int type, int reduction) {
    int kind = reduction == ncclAvg ? ncclSum : reduction;
    memcpy(into, c->slot(0), elements * width(type));
    for (int rank = 1; rank < c->ranks; rank++) combine(into, c->slot(rank), elements, type, kind);
    if (reduction == ncclAvg) divide(into, elements, type, c->ranks);
}

// Whether a message stays where it is: one rank's own, which is copied, or one that is too big to move.
bool settled(Communicator* c, const void* from, void* to, size_t size) {
    if (c->ranks == 1 && to != from) memmove(to, from, size);
    return c->ranks == 1 || size > settings::real_bytes();
}
}  // namespace

extern "C" {
ncclResult_t ncclGetVersion(int* version) {
    *version = 22907;
    return ncclSuccess;
}
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    static int made = 0;
    *id = {};
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    snprintf(id->internal, 100, "/fakenccl-%d-%d-%ld", getpid(), made++, now.tv_nsec);
    return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t) { return "an error of the stand-in NCCL"; }
const char* ncclGetLastError(ncclComm_t) { return "an error of the stand-in NCCL"; }

// Communicators
ncclResult_t ncclCommInitRank(ncclComm_t* out, int ranks, ncclUniqueId id, int rank) {
    size_t size = sizeof(Shared) + ranks * SLOT;
    int file = shm_open(id.internal, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, size)) return ncclSystemError;
    char* memory = (char*)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    auto* c = new Communicator{(Shared*)memory, memory + sizeof(Shared), ranks, rank};
    c->shared->joined.fetch_add(1);
    while (c->shared->joined < (uint32_t)ranks) usleep(200);
    c->wait();
    if (rank == 0) shm_unlink(id.internal);
    *out = (ncclComm_t)c;
    return ncclSuccess;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t* out, int ranks, ncclUniqueId id, int rank, ncclConfig_t*) {
    return ncclCommInitRank(out, ranks, id, rank);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t* out, int ranks, int rank, int, ncclUniqueId* ids, ncclConfig_t*) {
    return ncclCommInitRank(out, ranks, ids[0], rank);
}
ncclResult_t ncclCommSplit(ncclComm_t communicator, int color, int key, ncclComm_t* out, ncclConfig_t*) {
    struct Wish {
        int color, key;
        ncclUniqueId id;
    };
    auto* c = of(communicator);
    Wish own = {color, key};
    ncclGetUniqueId(&own.id);
    memcpy(c->slot(c->rank), &own, sizeof own);
    c->wait();
    int ranks = 0, rank = 0;
    Wish first = own;
    for (int other = 0; other < c->ranks; other++) {
        Wish wish;
        memcpy(&wish, c->slot(other), sizeof wish);
        if (wish.color != color) continue;
        if (!ranks || wish.key < first.key) first = wish;
        ranks++;
        rank += wish.key < key || (wish.key == key && other < c->rank);
    }
    c->wait();
    *out = nullptr;
    return color < 0 ? ncclSuccess : ncclCommInitRank(out, ranks, first.id, rank);
}
ncclResult_t ncclCommCount(const ncclComm_t communicator, int* ranks) {
    *ranks = of(communicator)->ranks;
    return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t communicator, int* rank) {
    *rank = of(communicator)->rank;
    return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) { return *error = ncclSuccess; }
ncclResult_t ncclCommRegister(const ncclComm_t, void*, size_t, void** handle) {
    *handle = nullptr;
    return ncclSuccess;
}
ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t* op, void*, ncclDataType_t, ncclScalarResidence_t, ncclComm_t) {
    *op = ncclSum;
    return ncclSuccess;
}
OK(ncclCommDeregister(const ncclComm_t, void*))
OK(ncclCommDestroy(ncclComm_t))
OK(ncclCommAbort(ncclComm_t))
OK(ncclCommFinalize(ncclComm_t))
OK(ncclRedOpDestroy(ncclRedOp_t, ncclComm_t))
OK(ncclGroupStart())
OK(ncclGroupEnd())

// Collectives
ncclResult_t ncclAllReduce(const void* from, void* to, size_t elements, ncclDataType_t type, ncclRedOp_t reduction,
                           ncclComm_t communicator, cudaStream_t) {
    auto* c = of(communicator);
    size_t each = width(type), piece = SLOT / each;
    if (!agree(c, ALL_REDUCE, elements, type)) return ncclInvalidArgument;
    if (settled(c, from, to, elements * each)) return ncclSuccess;
    std::vector<char> sum(SLOT);
    for (size_t at = 0; at < elements; at += piece) {
        size_t now = elements - at < piece ? elements - at : piece;
        memcpy(c->slot(c->rank), (const char*)from + at * each, now * each);
        c->wait();
        reduce_slots(c, sum.data(), now, type, reduction);
        c->wait();
        memcpy((char*)to + at * each, sum.data(), now * each);
    }
    return ncclSuccess;
}
ncclResult_t ncclReduce(const void* from, void* to, size_t elements, ncclDataType_t type, ncclRedOp_t reduction,
                        int root, ncclComm_t communicator, cudaStream_t stream) {
    bool kept = of(communicator)->rank == root || elements * width(type) > settings::real_bytes();
    std::vector<char> unused(kept ? 0 : elements * width(type));
    return ncclAllReduce(from, kept ? to : unused.data(), elements, type, reduction, communicator, stream);
}
ncclResult_t ncclBroadcast(const void* from, void* to, size_t elements, ncclDataType_t type, int root,
                           ncclComm_t communicator, cudaStream_t) {
    auto* c = of(communicator);
    size_t size = elements * width(type);
    if (!agree(c, BROADCAST, elements, type)) return ncclInvalidArgument;
    if (settled(c, from, to, size)) return ncclSuccess;
    for (size_t at = 0; at < size; at += SLOT) {
        size_t now = size - at < SLOT ? size - at : SLOT;
        if (c->rank == root) memcpy(c->slot(root), (const char*)from + at, now);
        c->wait();
        memcpy((char*)to + at, c->slot(root), now);
        c->wait();
    }
    return ncclSuccess;
}
ncclResult_t ncclBcast(void* buffer, size_t elements, ncclDataType_t type, int root, ncclComm_t communicator,
                       cudaStream_t stream) {
    return ncclBroadcast(buffer, buffer, elements, type, root, communicator, stream);
}
ncclResult_t ncclAllGather(const void* from, void* to, size_t elements, ncclDataType_t type, ncclComm_t communicator,
                           cudaStream_t) {
    auto* c = of(communicator);
    size_t size = elements * width(type);
    if (!agree(c, ALL_GATHER, elements, type)) return ncclInvalidArgument;
    if (settled(c, from, to, size)) return ncclSuccess;
    std::vector<char> own((const char*)from, (const char*)from + size);  // which may lie inside of `to`
    for (size_t at = 0; at < size; at += SLOT) {
        size_t now = size - at < SLOT ? size - at : SLOT;
        memcpy(c->slot(c->rank), own.data() + at, now);
        c->wait();
        for (int rank = 0; rank < c->ranks; rank++) memcpy((char*)to + rank * size + at, c->slot(rank), now);
        c->wait();
    }
    return ncclSuccess;
}
ncclResult_t ncclReduceScatter(const void* from, void* to, size_t elements, ncclDataType_t type,
                               ncclRedOp_t reduction, ncclComm_t communicator, cudaStream_t) {
    auto* c = of(communicator);
    size_t each = width(type), piece = SLOT / each;
    if (!agree(c, REDUCE_SCATTER, elements, type)) return ncclInvalidArgument;
    if (settled(c, from, to, elements * each)) return ncclSuccess;
    std::vector<char> own(elements * each);
    for (int part = 0; part < c->ranks; part++)
        for (size_t at = 0; at < elements; at += piece) {
            size_t now = elements - at < piece ? elements - at : piece;
            memcpy(c->slot(c->rank), (const char*)from + (part * elements + at) * each, now * each);
            c->wait();
            if (part == c->rank) reduce_slots(c, own.data() + at * each, now, type, reduction);
            c->wait();
        }
    memcpy(to, own.data(), elements * each);
    return ncclSuccess;
}
OK(ncclSend(const void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t))
OK(ncclRecv(void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t))
}
