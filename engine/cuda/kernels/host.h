// CUDA's words for a C++ compiler, so that the kernels run, and can be debugged, without a GPU.
//
// Blocks run one after the other. The threads of a block are fibers: each runs until it has to wait
// for others, at a barrier or a shuffle; a warp runs until all its lanes wait for other warps.
// `host.cpp` has the rest.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(threads, blocks)
#define REGISTER(name, threads) static const host::Kernel name##_kernel(#name, name, threads);
#define REQUIRE_ALIGNED(pointer, bytes) host::require_aligned(pointer, bytes)

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::fmaf;
using std::isnan;
using std::min;

namespace host {

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

struct Index {
    unsigned x, y, z;
};

// The block's shared memory: as many bytes as the launch asked for, all ones at its start.
void* shared();
// Ends the launch with an error if the pointer is not aligned to so many bytes.
void require_aligned(const void* pointer, size_t bytes);
// Waits until all threads of the block, or of the warp, have come here.
void wait_for_block();
void wait_for_warp();
// What lane `from` has given, of all lanes of the warp.
uint32_t exchange(uint32_t bits, unsigned from);

// An argument as it comes from outside: what it is, as in `kind_of`, and its bits.
struct Argument {
    uint32_t kind;
    uint64_t bits;
};

template <class A>
constexpr char kind_of() {
    if constexpr (std::is_pointer_v<A>) {
        return 'p';
    } else if constexpr (std::is_same_v<A, size_t>) {
        return 'z';
    } else {
        static_assert(std::is_same_v<A, int>);
        return 'i';
    }
}

// An entry point, in the list of all.
class Kernel {
  public:
    template <class... A>
    Kernel(const char* name, void (*function)(A...), unsigned bound)
        : name(name), kinds(Kinds<A...>::text), bound(bound), next(first),
          function(reinterpret_cast<void (*)()>(function)), unpack(call<A...>) {
        first = this;
    }

    void operator()(const Argument* arguments) const { unpack(function, arguments); }

    const char* const name;
    // The kind of each parameter.
    const char* const kinds;
    // Threads of the largest block.
    const unsigned bound;
    const Kernel* const next;
    static const Kernel* first;

  private:
    template <class... A>
    struct Kinds {
        static constexpr char text[] = {kind_of<A>()..., 0};
    };

    template <class... A>
    static void call(void (*function)(), const Argument* arguments) {
        unpack_with<A...>(function, arguments, std::index_sequence_for<A...>());
    }

    template <class... A, size_t... I>
    static void unpack_with(
        void (*function)(), const Argument* arguments, std::index_sequence<I...>) {
        reinterpret_cast<void (*)(A...)>(function)((A)arguments[I].bits...);
    }

    void (*const function)();
    void (*const unpack)(void (*)(), const Argument*);
};

} // namespace host

extern __thread host::Index threadIdx, blockIdx, blockDim, gridDim;

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

inline void __syncthreads() { host::wait_for_block(); }
inline void __syncwarp() { host::wait_for_warp(); }

template <class V>
V __shfl_sync(unsigned, V value, int lane) {
    return host::bits_as<V>(host::exchange(host::bits_as<uint32_t>(value), lane % 32));
}
template <class V>
V __shfl_xor_sync(unsigned, V value, int lanes) {
    return __shfl_sync(~0u, value, (threadIdx.x ^ lanes) % 32);
}

inline float __bfloat162float(__nv_bfloat16 x) {
    return host::bits_as<float>(uint32_t(x.bits) << 16);
}

// To the nearest, of two equally near ones to the even one.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    if (isnan(x)) {
        return {0x7fff};
    }
    const auto bits = host::bits_as<uint32_t>(x);
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
    const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    float size;
    if (exponent == 31) {
        size = host::bits_as<float>(0x7f800000 | fraction << 13);
    } else if (exponent == 0) {
        size = ldexpf(float(fraction), -24);
    } else {
        size = host::bits_as<float>((exponent + 112) << 23 | fraction << 13);
    }
    return host::bits_as<float>(host::bits_as<uint32_t>(size) | sign);
}
