// SPDX-License-Identifier: Apache-2.0
// Element types of the kernels, and packs of neighbours, for nvcc and for a
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

// Neighbouring elements that are read or written at once, 8 or 16 bytes. Where the threads of a
// warp work on neighbouring packs of several arrays, all must have the same kCount: else each of
// its loads has half of every sector that it touches.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  T at[kCount];
};

template <typename T>  // elements of 16 bytes
constexpr int kSixteen = 16 / static_cast<int>(sizeof(T));

#if defined(__CUDACC__)
template <size_t kBytes>
struct WordOf;
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<16> {
  using Type = uint4;
};
#endif

// What a kernel reads once shall not push other data out of its caches. A misaligned pack ends a
// CPU test.
template <int kCount, typename T>
DC_HOST_DEVICE Pack<T, kCount> load_pack(const T* from) {
#if defined(__CUDA_ARCH__)
  using Word = typename WordOf<sizeof(Pack<T, kCount>)>::Type;
  return bit_cast<Pack<T, kCount>>(__ldcs(reinterpret_cast<const Word*>(from)));
#else
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Pack<T, kCount>) != 0) std::abort();
  Pack<T, kCount> pack;
  memcpy(&pack, from, sizeof(pack));
  return pack;
#endif
}

template <typename T, int kCount>
DC_HOST_DEVICE void store_pack(const Pack<T, kCount>& pack, T* to) {
#if defined(__CUDA_ARCH__)
  using Word = typename WordOf<sizeof(pack)>::Type;
  __stwb(reinterpret_cast<Word*>(to), bit_cast<Word>(pack));  // by `=` it may be cut in two
#else
  if (reinterpret_cast<uintptr_t>(to) % sizeof(pack) != 0) std::abort();
  memcpy(to, &pack, sizeof(pack));
#endif
}

}  // namespace deepcompile::kernels
