// SPDX-License-Identifier: Apache-2.0
// From a caller's segments to the parameters of launches; on the host, without CUDA.
#pragma once

#include <cstdint>

#include "runtime/cuda/adamw_body.h"
#include "runtime/cuda/kernels.h"
#include "runtime/cuda/launch_table.h"

namespace deepcompile::kernels {

using SegmentArgument = deepcompile_cuda_adamw_segment;

// 0, or a deepcompile_cuda_refusal.
inline int check_segment(const SegmentArgument& segment, int gradient_type, int weight_type) {
  if (segment.numel < 0) return DEEPCOMPILE_CUDA_BAD_NUMEL;
  if (segment.numel == 0) return 0;
  if (segment.step < 1) return DEEPCOMPILE_CUDA_BAD_STEP;
  const bool pointers = usable_pointer(segment.master, 4) && usable_pointer(segment.exp_avg, 4) &&
                        usable_pointer(segment.exp_avg_sq, 4) &&
                        usable_pointer(segment.gradient, type_bytes(gradient_type)) &&
                        (weight_type == DEEPCOMPILE_CUDA_NONE ? segment.weight == nullptr
                                                              : usable_pointer(segment.weight, 2));
  if (!pointers) return DEEPCOMPILE_CUDA_BAD_POINTER;
  return segment.numel / kAdamChunk >= kMaxBlocks ? DEEPCOMPILE_CUDA_BAD_NUMEL : 0;
}

inline int check_adamw(const SegmentArgument* segments, int64_t count, int gradient_type,
                       int weight_type) {
  const bool types =
      (gradient_type == DEEPCOMPILE_CUDA_F32 || gradient_type == DEEPCOMPILE_CUDA_BF16 ||
       gradient_type == DEEPCOMPILE_CUDA_F16) &&
      (weight_type == DEEPCOMPILE_CUDA_NONE || weight_type == DEEPCOMPILE_CUDA_BF16 ||
       weight_type == DEEPCOMPILE_CUDA_F16);
  if (!types) return DEEPCOMPILE_CUDA_BAD_TYPE;
  if (count < 0 || (count > 0 && segments == nullptr)) return DEEPCOMPILE_CUDA_BAD_POINTER;
  for (int64_t i = 0; i < count; ++i) {
    const int status = check_segment(segments[i], gradient_type, weight_type);
    if (status != 0) return status;
  }
  return 0;
}

// How many elements come before the first at which a group of four can start in
// this array.
inline int32_t elements_before_group(const void* pointer, int64_t bytes) {
  const auto past = (reinterpret_cast<uintptr_t>(pointer) / static_cast<uintptr_t>(bytes)) % 4;
  return static_cast<int32_t>((4 - past) % 4);
}

inline int32_t head_of(const SegmentArgument& segment, int gradient_type, int weight_type) {
  const int32_t head = elements_before_group(segment.master, 4);
  const bool agree =
      elements_before_group(segment.exp_avg, 4) == head &&
      elements_before_group(segment.exp_avg_sq, 4) == head &&
      elements_before_group(segment.gradient, type_bytes(gradient_type)) == head &&
      (weight_type == DEEPCOMPILE_CUDA_NONE || elements_before_group(segment.weight, 2) == head);
  return agree && segment.numel >= head + 4 ? head : kSingleElements;
}

inline int64_t adamw_blocks(const AdamSegment& segment) {
  const int64_t first = segment.head == kSingleElements ? 0 : segment.head;
  return (segment.numel - first + kAdamChunk - 1) / kAdamChunk;
}

inline AdamSegment adamw_segment(const SegmentArgument& from, int gradient_type, int weight_type) {
  AdamSegment segment;
  segment.master = from.master;
  segment.exp_avg = from.exp_avg;
  segment.exp_avg_sq = from.exp_avg_sq;
  segment.gradient = from.gradient;
  segment.weight = from.weight;
  segment.numel = from.numel;
  segment.factors = adam_factors<float>(from.lr, from.beta1, from.beta2, from.eps,
                                        from.weight_decay, from.decoupled != 0, from.step);
  segment.grad_scale = static_cast<float>(from.grad_scale);
  segment.head = head_of(from, gradient_type, weight_type);
  return segment;
}

// Calls launch(table, blocks) -> int for as few tables as hold all segments; ends
// with the first that is not 0. The segments were checked.
template <typename Launch>
int for_each_adamw_table(const SegmentArgument* segments, int64_t count, int gradient_type,
                         int weight_type, const float* factor, Launch&& launch) {
  AdamTable table = {};
  table.factor = factor;
  AdamSegment segment;
  return for_each_launch(
      count, kAdamSegments, table.first_block,
      [&](int64_t i) -> int64_t {
        if (segments[i].numel == 0) return 0;
        segment = adamw_segment(segments[i], gradient_type, weight_type);
        return adamw_blocks(segment);
      },
      [&](int64_t, int entry) { table.segment[entry] = segment; },
      [&](int entries, uint32_t blocks) -> int {
        table.segments = entries;
        return launch(table, blocks);
      });
}

}  // namespace deepcompile::kernels
