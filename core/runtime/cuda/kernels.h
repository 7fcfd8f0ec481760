/* SPDX-License-Identifier: Apache-2.0
 *
 * The C interface of libdeepcompile_cuda.so: the runtime's kernels for NVIDIA
 * GPUs, with raw pointers and a stream. No torch, no allocation, no host wait:
 * every call may be captured into a CUDA graph, with the values that are passed
 * by the host fixed in it.
 *
 * Arrays are contiguous, in the memory of the device, and naturally aligned to
 * their elements; more is not asked for, but arrays whose addresses agree modulo
 * four elements are read and written in groups of four, which is faster for
 * gradients and weights. `device` is its ordinal: a call makes it current to the
 * calling thread if it is not. `stream` is a cudaStream_t of that device.
 *
 * Every function that returns an int returns 0 when all launches were accepted:
 * a positive number is a cudaError_t, a negative one says which argument is
 * wrong (before anything was launched). deepcompile_cuda_error has the text.
 */
#ifndef DEEPCOMPILE_RUNTIME_CUDA_KERNELS_H
#define DEEPCOMPILE_RUNTIME_CUDA_KERNELS_H

#include <stdint.h>

#define DEEPCOMPILE_CUDA_ABI 4 /* changes with every change below */
#define DEEPCOMPILE_CUDA_MAX_PIECES 16
#define DEEPCOMPILE_CUDA_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum deepcompile_cuda_type {
  DEEPCOMPILE_CUDA_NONE = 0,
  DEEPCOMPILE_CUDA_F32 = 1,
  DEEPCOMPILE_CUDA_BF16 = 2,
  DEEPCOMPILE_CUDA_F16 = 3,
  DEEPCOMPILE_CUDA_F64 = 4
};

enum deepcompile_cuda_refusal {
  DEEPCOMPILE_CUDA_BAD_TYPE = -1,      /* a type this function does not take */
  DEEPCOMPILE_CUDA_BAD_POINTER = -2,   /* null, or not aligned to its elements */
  DEEPCOMPILE_CUDA_BAD_NUMEL = -3,     /* negative, or too many for one launch */
  DEEPCOMPILE_CUDA_BAD_STEP = -4,      /* below 1 */
  DEEPCOMPILE_CUDA_BAD_WORKSPACE = -5, /* fewer partial sums than are needed */
  DEEPCOMPILE_CUDA_BAD_DEVICE = -6     /* no code for this device, or no such device */
};

/* The DEEPCOMPILE_CUDA_ABI this library was built with. */
DEEPCOMPILE_CUDA_API int deepcompile_cuda_abi(void);

/* A static text for any value returned here; valid until the process ends. */
DEEPCOMPILE_CUDA_API const char* deepcompile_cuda_error(int status);

/* 0 if the kernels run on the device, else why not. Loads them, so that a later
 * call may be captured into a graph; may make the device's context. */
DEEPCOMPILE_CUDA_API int deepcompile_cuda_usable(int device);

/* One stretch of elements with one set of settings. */
struct deepcompile_cuda_adamw_segment {
  float* master;        /* numel f32, updated */
  float* exp_avg;       /* numel f32, updated */
  float* exp_avg_sq;    /* numel f32, updated */
  const void* gradient; /* numel of the call's gradient type; read only */
  void* weight;      /* numel of the call's weight type, gets the new master rounded; else null */
  int64_t numel;     /* 0: nothing is done */
  double grad_scale; /* factor of the gradient, rounded to f32 */
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  int64_t step;      /* this update's number, from 1 */
  int32_t decoupled; /* 1: AdamW; 0: Adam, whose decay is added to the gradient */
  int32_t reserved;  /* 0 */
};

/* One update of `count` segments that do not overlap, in as few launches as 42
 * segments each allow. Element by element, with each operation rounded to f32:
 *
 *   g = gradient * grad_scale * factor + (decoupled ? 0 : weight_decay) * master
 *   m = exp_avg + (1 - beta1) * (g - exp_avg)
 *   v = exp_avg_sq * beta2 + (1 - beta2) * g * g
 *   master = master * (decoupled ? 1 - lr * weight_decay : 1)
 *            - lr / (1 - beta1^step) * (m / (sqrt(v) / sqrt(1 - beta2^step) + eps))
 *
 * so the same bits come from any cut into segments, any alignment, and the CPU.
 * gradient_type: F32, BF16 or F16. weight_type: NONE, BF16 or F16.
 * factor: one f32 on the device that is read when the kernel runs; null for 1. */
DEEPCOMPILE_CUDA_API int deepcompile_cuda_adamw(
    int device, void* stream, const struct deepcompile_cuda_adamw_segment* segments, int64_t count,
    int gradient_type, int weight_type, const float* factor);

struct deepcompile_cuda_gradient {
  const void* data;
  int64_t numel;
  double scale;     /* factor of every element */
  int32_t type;     /* F32, BF16, F16 or F64 */
  int32_t reserved; /* 0 */
};

/* How many partial sums (f64) squared_sum needs for these gradients. */
DEEPCOMPILE_CUDA_API int64_t deepcompile_cuda_squared_sum_partials(
    const struct deepcompile_cuda_gradient* gradients, int64_t count);

/* *out = sum over all gradients of (scale * element)^2, added up in f64, in an
 * order that depends on types and sizes alone: the same bits in every run.
 * partials: memory on the device for at least as many f64 as the function above
 * says; its contents do not matter. out: one f64 or f32, by out_type. */
DEEPCOMPILE_CUDA_API int deepcompile_cuda_squared_sum(
    int device, void* stream, const struct deepcompile_cuda_gradient* gradients, int64_t count,
    double* partials, int64_t partials_count, void* out, int out_type);

/* numel elements of each; out overlaps none. */
struct deepcompile_cuda_sum {
  const void* pieces[DEEPCOMPILE_CUDA_MAX_PIECES]; /* as many as the call says */
  void* out;
  int64_t numel;    /* 0: nothing is done */
  int32_t first;    /* piece_totals: what out holds does not matter */
  int32_t reserved; /* 0 */
};

/* For each of `count` sums: out = pieces[0] + pieces[1] + ..., element by element,
 * added up in that order in f32 (F64: in f64) and rounded once, so that the bits
 * depend on the values alone. type: F32, BF16, F16 or F64. pieces: 1 to
 * DEEPCOMPILE_CUDA_MAX_PIECES. In as few launches as 24 sums each allow; fastest
 * where all arrays are aligned to 16 bytes. */
DEEPCOMPILE_CUDA_API int deepcompile_cuda_piece_sums(int device, void* stream,
                                                     const struct deepcompile_cuda_sum* sums,
                                                     int64_t count, int64_t pieces, int type);

/* As piece_sums, but the rounded sum goes into a total: out (F32; F64 where type is)
 * = out + scale * sum, or scale * sum if it is the first. `scale` is rounded to the
 * total's type, and so is each operation. */
DEEPCOMPILE_CUDA_API int deepcompile_cuda_piece_totals(int device, void* stream,
                                                       const struct deepcompile_cuda_sum* sums,
                                                       int64_t count, int64_t pieces, int type,
                                                       double scale);

#ifdef __cplusplus
}
#endif

#endif
