// SPDX-License-Identifier: Apache-2.0
// Element types of the kernels, and groups of four of them, for nvcc and for a
// plain C++ compiler: the tests run the kernels' bodies on a CPU.
//
// C++17, because older nvcc stops there.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__CUDACC__)
#define DC_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DC_HOST_DEVICE inline
#endif

namespace deepcompile::kernels {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
// Type of a weight that is not there: the master is the weight.
struct NoWeight {};

template <typename To, typename From>
DC_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits are kept");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

DC_HOST_DEVICE float to_f32(float value) {
  return value;
}
DC_HOST_DEVICE float to_f32(Bf16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

#if defined(__CUDA_ARCH__)

DC_HOST_DEVICE float to_f32(F16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}
DC_HOST_DEVICE void round_to(float value, Bf16* out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(value));
}
DC_HOST_DEVICE void round_to(float value, F16* out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(value));
}

#else

// Exact; infinities and NaNs stay what they are.
DC_HOST_DEVICE float to_f32(F16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest < 0x400u) {  // subnormal: rest * 2^-24
    const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  return bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
}
// To the nearest, ties to even; a NaN becomes the one that the device makes.
DC_HOST_DEVICE void round_to(float value, Bf16* out) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  out->bits = (bits & 0x7fffffffu) > 0x7f800000u
                  ? 0x7fff
                  : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
DC_HOST_DEVICE void round_to(float value, F16* out) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    out->bits = 0x7fff;
    return;
  }
  if (rest >= 0x477ff000u) {  // rounds to at least 2^16
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // subnormal: adding 0.5 rounds to multiples of 2^-24
    half = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

#endif

// Four elements that are read or written at once: 16 bytes of f32, 8 of 16-bit types.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// The device streams: what a kernel reads and writes once shall not push other
// data out of its caches. A misaligned group ends a CPU test.
template <typename T>
DC_HOST_DEVICE Four<T> load_four(const T* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {
    return bit_cast<Four<T>>(__ldcs(reinterpret_cast<const uint4*>(from)));
  } else {
    return bit_cast<Four<T>>(__ldcs(reinterpret_cast<const uint2*>(from)));
  }
#else
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Four<T>) != 0) std::abort();
  Four<T> four;
  memcpy(&four, from, sizeof(four));
  return four;
#endif
}

template <typename T>
DC_HOST_DEVICE void store_four(const Four<T>& four, T* to) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {
    __stcs(reinterpret_cast<uint4*>(to), bit_cast<uint4>(four));
  } else {
    // Weights are gathered soon: these may stay in the cache.
    *reinterpret_cast<uint2*>(to) = bit_cast<uint2>(four);
  }
#else
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Four<T>) != 0) std::abort();
  memcpy(to, &four, sizeof(four));
#endif
}

// Sixteen bytes of elements.
template <typename T>
struct alignas(16) SixteenBytes {
  static constexpr int kCount = 16 / sizeof(T);
  T at[kCount];
};

template <typename T>
DC_HOST_DEVICE SixteenBytes<T> load_sixteen(const T* from) {
#if defined(__CUDA_ARCH__)
  return bit_cast<SixteenBytes<T>>(__ldcs(reinterpret_cast<const uint4*>(from)));
#else
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) std::abort();
  SixteenBytes<T> loaded;
  memcpy(&loaded, from, sizeof(loaded));
  return loaded;
#endif
}

template <typename T>
DC_HOST_DEVICE void store_sixteen(const SixteenBytes<T>& sixteen, T* to) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<uint4*>(to) = bit_cast<uint4>(sixteen);
#else
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) std::abort();
  memcpy(to, &sixteen, sizeof(sixteen));
#endif
}

}  // namespace deepcompile::kernels
