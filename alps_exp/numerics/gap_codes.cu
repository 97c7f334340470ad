// Products with a matrix in gap codes, and the matrix itself (gap_codes.py says what the codes are).
// Defined by the caller: W bits of a code, B columns of activations at a time, KIND of number (0 bfloat16, 1 float16,
// 2 float32), THREADS of a block, BLOCKS of them on a multiprocessor, P groups that each
// thread has in flight.
typedef unsigned int u32;
typedef unsigned short u16;
#if KIND == 2
typedef u32 T;
#define BYTES 4
#else
typedef u16 T;
#define BYTES 2
#endif
#define WARPS (THREADS / 32)
#define ALL 0xffffffffu

__device__ __forceinline__ float widen(u32 bits) {
#if KIND == 0
    return __uint_as_float(bits << 16);
#elif KIND == 1
    float number;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(number) : "r"(bits));
    return number;
#else
    return __uint_as_float(bits);
#endif
}
__device__ __forceinline__ T narrow(float number) {
#if KIND == 0
    T bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
#elif KIND == 1
    T bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
#else
    return __float_as_uint(number);
#endif
}
// The lower and the upper of two numbers of 16 bits.
__device__ __forceinline__ float lower(u32 pair) { return widen(pair & 0xffffu); }
__device__ __forceinline__ float upper(u32 pair) {
#if KIND == 0
    return __uint_as_float(pair & 0xffff0000u);
#else
    return widen(pair >> 16);
#endif
}

// Eight entries: their values and codes.
struct Group {
    uint4 values[BYTES / 2];
    u32 codes[W == 8 ? 2 : 1];
};

__device__ __forceinline__ void load(Group& group, const uint4* values, const u32* codes, int at, int end) {
    if (at >= end) return;
#pragma unroll
    for (int i = 0; i < BYTES / 2; i++) {
        uint4& v = group.values[i];  // each is read once: it shall not take the cache from the activations
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(values + (long long)at * (BYTES / 2) + i));
    }
#if W == 4
    group.codes[0] = __ldg(codes + at);
#elif W == 8
    uint2 both = __ldg((const uint2*)codes + at);
    group.codes[0] = both.x, group.codes[1] = both.y;
#else
    long long byte = 3ll * at;
    const u32* word = codes + (byte >> 2);
    group.codes[0] = __funnelshift_r(__ldg(word), __ldg(word + 1), ((u32)byte & 3) * 8);
#endif
}

// By how many columns the eight entries advance together.
__device__ __forceinline__ int advance(const Group& group) {
#if W == 4
    u32 c = group.codes[0];
    return __dp4a(c & 0x0f0f0f0fu, 0x01010101u, __dp4a(c >> 4 & 0x0f0f0f0fu, 0x01010101u, 8u));
#elif W == 8
    return __dp4a(group.codes[0], 0x01010101u, __dp4a(group.codes[1], 0x01010101u, 8u));
#else
    u32 sums = (group.codes[0] & 07070707u) + (group.codes[0] >> 3 & 07070707u);  // four sums of two, 6 bits each
    return (sums * 0x41041u >> 18 & 63u) + 8;
#endif
}

// Code J of a group times SIZE, a power of two.
template <int J, int SIZE> __device__ __forceinline__ u32 scaled(const Group& group) {
    constexpr int shift = SIZE == 1 ? 0 : SIZE == 2 ? 1 : SIZE == 4 ? 2 : SIZE == 8 ? 3 : SIZE == 16 ? 4 : 5;
    constexpr int place = W == 8 ? J % 4 * 8 : J * W;
    constexpr u32 mask = ((1u << W) - 1) << shift;
    u32 word = group.codes[W == 8 ? J / 4 : 0];
    return (place >= shift ? word >> (place >= shift ? place - shift : 0) : word << (place < shift ? shift - place : 0)) & mask;
}

template <int J> __device__ __forceinline__ u32 word(const Group& group) {
    constexpr int at = J * BYTES / 4;
    const uint4& v = group.values[at / 4];
    return at % 4 == 0 ? v.x : at % 4 == 1 ? v.y : at % 4 == 2 ? v.z : v.w;
}
template <int J> __device__ __forceinline__ float value(const Group& group) {
#if KIND == 2
    return __uint_as_float(word<J>(group));
#else
    return J % 2 ? upper(word<J>(group)) : lower(word<J>(group));
#endif
}
template <int J> __device__ __forceinline__ T bits(const Group& group) {
#if KIND == 2
    return word<J>(group);
#else
    return J % 2 ? word<J>(group) >> 16 : word<J>(group) & 0xffffu;
#endif
}

// The column before the first of a thread's entries, and of a warp's next ones.
__device__ __forceinline__ int before(int own, int lane, int& carry) {
    int sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(ALL, sum, step);
        if (lane >= step) sum += other;
    }
    int first = carry + sum - own;
    carry += __shfl_sync(ALL, sum, 31);
    return first;
}

// Adds entry J times the activations of its column, which lie side by side for the B rows.
template <int J> __device__ __forceinline__ void add(const Group& group, u32& at, const char* shared, float* sums) {
    at += scaled<J, B * BYTES>(group);
    const char* place = shared + at + (J + 1) * B * BYTES;
    float weight = value<J>(group);
#if KIND == 2
#pragma unroll
    for (int b = 0; b < B; b++) sums[b] += weight * ((const float*)place)[b];
#elif B == 1
    sums[0] += weight * widen(*(const u16*)place);
#else
    u32 pairs[B / 2];
#if B == 2
    pairs[0] = *(const u32*)place;
#elif B == 4
    uint2 read = *(const uint2*)place;
    pairs[0] = read.x, pairs[1] = read.y;
#else
    uint4 read = *(const uint4*)place;
    pairs[0] = read.x, pairs[1] = read.y, pairs[2] = read.z, pairs[3] = read.w;
#endif
#pragma unroll
    for (int b = 0; b < B / 2; b++) {
        sums[2 * b] += weight * lower(pairs[b]);
        sums[2 * b + 1] += weight * upper(pairs[b]);
    }
#endif
}

// y = x Wᵀ + bias: x (batch, cols), batch at most B; y (batch, rows). A warp takes a row of W after the other. Shared memory
// holds x and eight columns of zeros, which the entries that fill a row's last group meet.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) product(
    const uint4* __restrict__ values, const u32* __restrict__ codes, const int* __restrict__ starts,
    const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ y, int rows, int cols, int batch) {
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x & 31;
    int row = blockIdx.x * WARPS + threadIdx.x / 32;
#if PDL
    // Weights do not depend on the kernel before: they are on their way while it ends. What it wrote is read after the
    // wait below, and so may the next one be launched now.
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    int start = 0, end = 0;
    if (row < rows) start = __ldg(starts + row), end = __ldg(starts + row + 1);
    Group groups[P];
#pragma unroll
    for (int i = 0; i < P; i++) load(groups[i], values, codes, start + lane + 32 * i, end);
#if PDL
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#if B == 1
    for (int i = threadIdx.x; i < cols * BYTES / 16; i += THREADS) ((uint4*)shared)[i] = ((const uint4*)x)[i];
#else
    for (int i = threadIdx.x; i < cols; i += THREADS)
#pragma unroll
        for (int b = 0; b < B; b++) ((T*)shared)[i * B + b] = b < batch ? x[(long long)b * cols + i] : (T)0;
#endif
    for (int i = threadIdx.x; i < 8 * B; i += THREADS) ((T*)shared)[cols * B + i] = 0;
    __syncthreads();
    while (row < rows) {
        const int next = row + gridDim.x * WARPS;
        const int begin = next < rows ? __ldg(starts + next) : 0, finish = next < rows ? __ldg(starts + next + 1) : 0;
        float sums[B];
#pragma unroll
        for (int b = 0; b < B; b++) sums[b] = 0;
        int carry = -1;
        for (int base = start; base < end; base += 32 * P) {
#pragma unroll
            for (int i = 0; i < P; i++) {
                if (base + 32 * i >= end) break;
                const int at = base + 32 * i + lane;
                const int own = at < end ? advance(groups[i]) : 0;
                u32 place = before(own, lane, carry) * (B * BYTES);
                if (at < end) {
                    add<0>(groups[i], place, shared, sums), add<1>(groups[i], place, shared, sums);
                    add<2>(groups[i], place, shared, sums), add<3>(groups[i], place, shared, sums);
                    add<4>(groups[i], place, shared, sums), add<5>(groups[i], place, shared, sums);
                    add<6>(groups[i], place, shared, sums), add<7>(groups[i], place, shared, sums);
                }
                load(groups[i], values, codes, at + 32 * P, end);
            }
        }
        start = begin, end = finish;
#pragma unroll
        for (int i = 0; i < P; i++) load(groups[i], values, codes, start + lane + 32 * i, end);
#pragma unroll
        for (int b = 0; b < B; b++) {
#pragma unroll
            for (int step = 16; step; step /= 2) sums[b] += __shfl_xor_sync(ALL, sums[b], step);
            if (lane == b && b < batch) {
                const float own = bias ? sums[b] + widen(bias[row]) : sums[b];
                y[(long long)b * rows + row] = narrow(own);
            }
        }
        row = next;
    }
}

// The dense matrix (rows, cols). A warp takes a row and writes it SPAN columns at a time.
#define SPAN (4096 / BYTES)
template <int J> __device__ __forceinline__ void put(const Group& group, int& column, T* span, int from) {
    column += scaled<J, 1>(group) + 1;
    const T number = bits<J>(group);
    if (number && (u32)(column - from) < SPAN) span[column - from] = number;
}
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) unpack(
    const uint4* __restrict__ values, const u32* __restrict__ codes, const int* __restrict__ starts,
    uint4* __restrict__ dense, int rows, int cols) {
    extern __shared__ __align__(16) char shared[];
    uint4* span = (uint4*)shared + threadIdx.x / 32 * (SPAN * BYTES / 16);
    const int lane = threadIdx.x & 31, row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const int start = __ldg(starts + row), end = __ldg(starts + row + 1), vectors = SPAN * BYTES / 16;
    const uint4 zeros = make_uint4(0, 0, 0, 0);
    Group groups[P];
#pragma unroll
    for (int i = 0; i < P; i++) load(groups[i], values, codes, start + lane + 32 * i, end);
    for (int i = lane; i < vectors; i += 32) span[i] = zeros;
    __syncwarp();
    dense += (long long)row * (cols * BYTES / 16);
    int carry = -1, from = 0;
    auto write = [&]() {
        __syncwarp();
        const int here = min(SPAN, cols - from) * BYTES / 16;
        for (int i = lane; i < here; i += 32) dense[i] = span[i], span[i] = zeros;
        __syncwarp();
        dense += vectors, from += SPAN;
    };
    for (int base = start; base < end; base += 32 * P) {
#pragma unroll
        for (int i = 0; i < P; i++) {
            if (base + 32 * i >= end) break;
            const int at = base + 32 * i + lane;
            const int own = at < end ? advance(groups[i]) : 0, first = before(own, lane, carry);
            while (true) {
                if (at < end) {
                    int column = first;
                    put<0>(groups[i], column, (T*)span, from), put<1>(groups[i], column, (T*)span, from);
                    put<2>(groups[i], column, (T*)span, from), put<3>(groups[i], column, (T*)span, from);
                    put<4>(groups[i], column, (T*)span, from), put<5>(groups[i], column, (T*)span, from);
                    put<6>(groups[i], column, (T*)span, from), put<7>(groups[i], column, (T*)span, from);
                }
                if (carry < from + SPAN || from + SPAN >= cols) break;
                write();
            }
            load(groups[i], values, codes, at + 32 * P, end);
        }
    }
    while (from < cols) write();
}
