// SPDX-License-Identifier: Apache-2.0
// The bodies of the GPU kernels, run on a CPU: block by block, thread by thread.
// Arrays end where their memory does, so a sanitizer sees what reaches too far.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <random>
#include <type_traits>
#include <vector>

#include "runtime/cuda/adamw_body.h"
#include "runtime/cuda/adamw_table.h"
#include "runtime/cuda/piece_sum_body.h"
#include "runtime/cuda/squared_sum_body.h"

namespace deepcompile::kernels {
namespace {

// `value` rounded to the nearest with `digits` bits of precision, exponents from `least` on.
double rounded(double value, int digits, int least, double largest) {
  if (value == 0.0 || std::isnan(value) || std::isinf(value)) return value;
  const int exponent = std::max(std::ilogb(value), least);
  const double unit = std::ldexp(1.0, exponent - digits + 1);
  const double nearest = std::nearbyint(value / unit) * unit;
  return std::fabs(nearest) > largest ? std::copysign(INFINITY, value) : nearest;
}

template <typename T>
float through(float value) {
  T small;
  round_to(value, &small);
  return to_f32(small);
}

TEST(KernelNumbers, SixteenBitTypesRoundToTheNearest) {
  std::mt19937 random(1);
  const double largest_bf16 = std::ldexp(255.0, 120);
  for (int i = 0; i < 300'000; ++i) {
    uint32_t bits = random();
    if (i % 2) bits = (bits & 0xffffe000u) | (i % 4 == 1 ? 0x1000u : 0x0fffu);  // near f16's ties
    if (i % 3 == 0) bits = (bits & 0xffff0000u) | 0x8000u;                      // bf16's ties
    if (i % 5) bits = (bits & 0x8fffffffu) | 0x30000000u;  // exponents around f16's
    const float value = bit_cast<float>(bits);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(through<Bf16>(value)) && std::isnan(through<F16>(value)));
      continue;
    }
    ASSERT_EQ(through<Bf16>(value), static_cast<float>(rounded(value, 8, -126, largest_bf16)))
        << value;
    ASSERT_EQ(through<F16>(value), static_cast<float>(rounded(value, 11, -14, 65504.0))) << value;
  }
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {  // what has 16 bits comes back as it was
    const F16 half{static_cast<uint16_t>(bits)};
    F16 again;
    round_to(to_f32(half), &again);
    if (std::isnan(to_f32(half))) continue;
    ASSERT_EQ(again.bits, half.bits);
  }
}

// One element in f64, as the textbooks have it.
struct Exact {
  double master, exp_avg, exp_avg_sq;
};
Exact textbook(const SegmentArgument& s, double gradient, Exact was) {
  double g = gradient;
  Exact now = was;
  if (s.decoupled) {
    now.master -= s.lr * s.weight_decay * was.master;
  } else {
    g += s.weight_decay * was.master;
  }
  now.exp_avg = s.beta1 * was.exp_avg + (1.0 - s.beta1) * g;
  now.exp_avg_sq = s.beta2 * was.exp_avg_sq + (1.0 - s.beta2) * g * g;
  const double m = now.exp_avg / (1.0 - std::pow(s.beta1, static_cast<double>(s.step)));
  const double v = now.exp_avg_sq / (1.0 - std::pow(s.beta2, static_cast<double>(s.step)));
  now.master -= s.lr * m / (std::sqrt(v) + s.eps);
  return now;
}

SegmentArgument settings(int64_t step, bool decoupled) {
  SegmentArgument s = {};
  s.grad_scale = 0.25;
  s.lr = 3e-3;
  s.beta1 = 0.9;
  s.beta2 = 0.999;
  s.eps = 1e-8;
  s.weight_decay = 0.1;
  s.step = step;
  s.decoupled = decoupled;
  return s;
}

TEST(KernelAdam, OneElementIsTheTextbooksToRounding) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (int i = 0; i < 100'000; ++i) {
    const SegmentArgument s = settings(1 + i % 1000, i % 2);
    const AdamFactors<float> factors =
        adam_factors<float>(s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.decoupled, s.step);
    float master = normal(random), exp_avg = 0.1f * normal(random), gradient = normal(random);
    float exp_avg_sq = std::fabs(0.01f * normal(random));
    const Exact exact = textbook(s, gradient, {master, exp_avg, exp_avg_sq});
    const double scale = std::fabs(exp_avg) + std::fabs(gradient) + std::fabs(master);
    adam_element(gradient, factors, &master, &exp_avg, &exp_avg_sq);
    const double rounding = 0x1p-24;
    ASSERT_NEAR(exp_avg, exact.exp_avg, 4 * rounding * scale);
    ASSERT_NEAR(exp_avg_sq, exact.exp_avg_sq, 8 * rounding * exact.exp_avg_sq + 1e-12);
    ASSERT_NEAR(master, exact.master, 4 * rounding * (1.0 + std::fabs(exact.master)));
  }
}

// Arrays of one segment, each starting `offset` elements past an aligned address.
template <typename Grad, typename Weight>
struct Arrays {
  static constexpr float kGuard = -77.0f;
  static constexpr bool kRounds = sizeof(Weight) == 2;

  Arrays(int64_t numel, std::array<int, 5> offsets, unsigned seed) : numel(numel), at(offsets) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto make = [&](int offset, auto value) {
      std::vector<float> values(offset + numel, kGuard);
      std::generate(values.begin() + offset, values.end(), value);
      return values;
    };
    master = make(at[0], [&] { return normal(random); });
    exp_avg = make(at[1], [&] { return 0.1f * normal(random); });
    exp_avg_sq = make(at[2], [&] { return std::fabs(0.01f * normal(random)); });
    gradient.resize(at[3] + numel);
    for (Grad& g : gradient) set(normal(random), &g);
    if constexpr (kRounds) weight.assign(at[4] + numel, Weight{0x1234});
  }
  static void set(float value, float* to) { *to = value; }
  template <typename T>
  static void set(float value, T* to) {
    round_to(value, to);
  }

  // Elements [begin, end) as an argument of the library.
  SegmentArgument argument(SegmentArgument s, int64_t begin, int64_t end) {
    s.master = master.data() + at[0] + begin;
    s.exp_avg = exp_avg.data() + at[1] + begin;
    s.exp_avg_sq = exp_avg_sq.data() + at[2] + begin;
    s.gradient = gradient.data() + at[3] + begin;
    if constexpr (kRounds) s.weight = weight.data() + at[4] + begin;
    s.numel = end - begin;
    return s;
  }
  // What the arrays should hold after the update.
  void update_plainly(const SegmentArgument& s, float factor) {
    const AdamFactors<float> factors =
        adam_factors<float>(s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.decoupled, s.step);
    for (int64_t i = 0; i < numel; ++i) {
      const float scaled = to_f32(gradient[at[3] + i]) * static_cast<float>(s.grad_scale) * factor;
      adam_element(scaled, factors, &master[at[0] + i], &exp_avg[at[1] + i],
                   &exp_avg_sq[at[2] + i]);
      if constexpr (kRounds) round_to(master[at[0] + i], &weight[at[4] + i]);
    }
  }
  void expect_equal(const Arrays& other) const {
    EXPECT_EQ(master, other.master);
    EXPECT_EQ(exp_avg, other.exp_avg);
    EXPECT_EQ(exp_avg_sq, other.exp_avg_sq);
    if constexpr (kRounds) {
      const auto same = [](Weight a, Weight b) { return a.bits == b.bits; };
      EXPECT_TRUE(std::equal(weight.begin(), weight.end(), other.weight.begin(), same));
    }
  }

  int64_t numel;
  std::array<int, 5> at;
  std::vector<float> master, exp_avg, exp_avg_sq;
  std::vector<Grad> gradient;
  std::vector<Weight> weight;
};

template <typename T>
constexpr int type_of() {
  return std::is_same_v<T, float>  ? DEEPCOMPILE_CUDA_F32
         : std::is_same_v<T, Bf16> ? DEEPCOMPILE_CUDA_BF16
         : std::is_same_v<T, F16>  ? DEEPCOMPILE_CUDA_F16
                                   : DEEPCOMPILE_CUDA_NONE;
}

// As the library does, with loops for blocks and threads; the number of launches.
template <typename Grad, typename Weight>
int update_by_blocks(const std::vector<SegmentArgument>& segments, const float* factor) {
  const auto count = static_cast<int64_t>(segments.size());
  const int gradients = type_of<Grad>(), weights = type_of<Weight>();
  EXPECT_EQ(check_adamw(segments.data(), count, gradients, weights), 0);
  int launches = 0;
  const auto launch = [&](const AdamTable& table, uint32_t blocks) {
    ++launches;
    for (uint32_t block = 0; block < blocks; ++block) {
      const int s = entry_of(table.first_block, table.segments, block);
      for (int thread = 0; thread < kAdamThreads; ++thread) {
        adamw_thread<Grad, Weight>(table.segment[s], table.factor ? *table.factor : 1.0f,
                                   block - table.first_block[s], thread);
      }
    }
    return 0;
  };
  EXPECT_EQ(for_each_adamw_table(segments.data(), count, gradients, weights, factor, launch), 0);
  return launches;
}

template <typename Grad, typename Weight>
void compare_sizes_and_offsets() {
  const float factor = 0.7f;
  unsigned seed = 0;
  const std::array<int, 5> offsets[] = {{0, 0, 0, 0, 0}, {1, 1, 1, 1, 1}, {3, 3, 7, 3, 3},
                                        {2, 2, 2, 1, 2}, {0, 1, 2, 3, 5}, {0, 0, 0, 0, 1}};
  for (const auto& offset : offsets) {
    for (const int64_t numel : {1, 2, 3, 4, 5, 8, 1023, 1031, 8191, 8192, 8195, 8199, 17001}) {
      Arrays<Grad, Weight> arrays(numel, offset, ++seed), expected = arrays;
      const SegmentArgument s = settings(1 + seed, seed % 2);
      const float* given = seed % 3 ? &factor : nullptr;
      expected.update_plainly(s, given ? factor : 1.0f);
      EXPECT_EQ((update_by_blocks<Grad, Weight>({arrays.argument(s, 0, numel)}, given)), 1);
      arrays.expect_equal(expected);
      if (::testing::Test::HasFailure()) FAIL() << numel << " elements, offset " << offset[4];
    }
  }
}

TEST(KernelAdam, BlocksAndThreadsCoverEveryElementOnce) {
  compare_sizes_and_offsets<float, NoWeight>();
  compare_sizes_and_offsets<float, Bf16>();
  compare_sizes_and_offsets<float, F16>();
  compare_sizes_and_offsets<Bf16, NoWeight>();
  compare_sizes_and_offsets<Bf16, Bf16>();
  compare_sizes_and_offsets<Bf16, F16>();
  compare_sizes_and_offsets<F16, NoWeight>();
  compare_sizes_and_offsets<F16, Bf16>();
  compare_sizes_and_offsets<F16, F16>();
}

TEST(KernelAdam, AnyCutIntoSegmentsGivesTheSameBits) {
  const int64_t numel = 60'000;
  Arrays<Bf16, Bf16> whole(numel, {0, 0, 0, 0, 0}, 5), cut = whole;
  const SegmentArgument s = settings(7, true);
  EXPECT_EQ((update_by_blocks<Bf16, Bf16>({whole.argument(s, 0, numel)}, nullptr)), 1);
  std::mt19937 random(6);
  std::vector<int64_t> places{0, numel};
  for (int i = 0; i < 99; ++i) places.push_back(random() % numel);
  places.push_back(places.back());  // an empty segment
  std::sort(places.begin(), places.end());
  std::vector<SegmentArgument> segments;
  for (size_t i = 1; i < places.size(); ++i) {
    segments.push_back(cut.argument(s, places[i - 1], places[i]));
  }
  const auto filled = std::count_if(segments.begin(), segments.end(),
                                    [](const SegmentArgument& part) { return part.numel > 0; });
  EXPECT_EQ((update_by_blocks<Bf16, Bf16>(segments, nullptr)),
            (filled + kAdamSegments - 1) / kAdamSegments);
  cut.expect_equal(whole);
}

TEST(KernelAdam, GroupsAreUsedWhereAddressesAgree) {
  Arrays<Bf16, Bf16> same(100, {3, 3, 3, 3, 3}, 8), other(100, {0, 0, 0, 0, 1}, 9);
  const SegmentArgument s = settings(1, true);
  const int bf16 = DEEPCOMPILE_CUDA_BF16;
  EXPECT_EQ(head_of(same.argument(s, 0, 100), bf16, bf16), 1);
  EXPECT_EQ(head_of(same.argument(s, 1, 100), bf16, bf16), 0);
  EXPECT_EQ(head_of(same.argument(s, 0, 4), bf16, bf16), kSingleElements);
  EXPECT_EQ(head_of(other.argument(s, 0, 100), bf16, bf16), kSingleElements);
}

TEST(KernelAdam, RefusesWhatItCannotDo) {
  Arrays<Bf16, Bf16> arrays(10, {0, 0, 0, 0, 0}, 3);
  const SegmentArgument good = arrays.argument(settings(1, true), 0, 10);
  const auto refusal = [&](SegmentArgument s, int gradient = DEEPCOMPILE_CUDA_BF16,
                           int weight = DEEPCOMPILE_CUDA_BF16) {
    return check_adamw(&s, 1, gradient, weight);
  };
  EXPECT_EQ(refusal(good), 0);
  EXPECT_EQ(refusal(good, DEEPCOMPILE_CUDA_F64), DEEPCOMPILE_CUDA_BAD_TYPE);
  EXPECT_EQ(refusal(good, DEEPCOMPILE_CUDA_BF16, DEEPCOMPILE_CUDA_F32), DEEPCOMPILE_CUDA_BAD_TYPE);
  EXPECT_EQ(refusal(good, DEEPCOMPILE_CUDA_BF16, DEEPCOMPILE_CUDA_NONE),
            DEEPCOMPILE_CUDA_BAD_POINTER);
  SegmentArgument bad = good;
  bad.master = nullptr;
  EXPECT_EQ(refusal(bad), DEEPCOMPILE_CUDA_BAD_POINTER);
  bad = good;
  bad.gradient = static_cast<const char*>(good.gradient) + 1;
  EXPECT_EQ(refusal(bad), DEEPCOMPILE_CUDA_BAD_POINTER);
  bad = good;
  bad.step = 0;
  EXPECT_EQ(refusal(bad), DEEPCOMPILE_CUDA_BAD_STEP);
  bad.numel = -1;
  EXPECT_EQ(refusal(bad), DEEPCOMPILE_CUDA_BAD_NUMEL);
  bad.numel = 0;  // nothing to do, nothing to refuse
  EXPECT_EQ(refusal(bad), 0);
}

// What a block's threads hold, added as the kernel's block_sum does.
double block_sum(std::vector<double> values) {
  const auto fold = [](double* from, size_t count) {
    for (size_t half = count / 2; half > 0; half /= 2) {
      for (size_t i = 0; i < half; ++i) from[i] += from[i + half];
    }
    return from[0];
  };
  std::vector<double> warps;
  for (size_t i = 0; i < values.size(); i += 32) warps.push_back(fold(values.data() + i, 32));
  return fold(warps.data(), warps.size());
}

double squared_sum_by_blocks(const std::vector<GradientArgument>& gradients) {
  const auto count = static_cast<int64_t>(gradients.size());
  EXPECT_EQ(check_gradients(gradients.data(), count), 0);
  int64_t needed = 0;
  for (const GradientArgument& gradient : gradients) needed += sum_blocks(gradient);
  std::vector<double> partials(needed, std::numeric_limits<double>::quiet_NaN());
  const auto launch = [&](const SumTable& table, uint32_t blocks) {
    for (uint32_t block = 0; block < blocks; ++block) {
      const int g = entry_of(table.first_block, table.gradients, block);
      std::vector<double> values;
      for (int thread = 0; thread < kSumThreads; ++thread) {
        values.push_back(
            squared_sum_thread(table.gradient[g], block - table.first_block[g], thread));
      }
      const double scale = table.gradient[g].scale;
      table.partials[block] = block_sum(values) * (scale * scale);
    }
    return 0;
  };
  EXPECT_EQ(for_each_sum_table(gradients.data(), count, partials.data(), launch), 0);
  std::vector<double> values;
  for (int thread = 0; thread < kTotalThreads; ++thread) {
    values.push_back(total_thread(partials.data(), needed, thread));
  }
  return block_sum(values);
}

template <typename T>
void set(double value, T* to) {
  if constexpr (sizeof(T) == 2) {
    round_to(static_cast<float>(value), to);
  } else {
    *to = static_cast<T>(value);
  }
}

template <typename T>
void compare_squared_sums(int type) {
  for (const int64_t numel : {0, 1, 7, 8, 511, 4096, 32767, 32768, 32769, 100'003}) {
    std::vector<T> aligned(numel), moved(numel + 1);
    std::mt19937 random(static_cast<unsigned>(numel));
    std::normal_distribution<double> normal;
    double expected = 0.0;
    for (int64_t i = 0; i < numel; ++i) {
      set(normal(random), &aligned[i]);
      moved[i + 1] = aligned[i];
      expected += to_f64(aligned[i]) * to_f64(aligned[i]);
    }
    const double scale = 1.0 / 3.0;
    const double sum = squared_sum_by_blocks({{aligned.data(), numel, scale, type, 0}});
    EXPECT_NEAR(sum, expected * scale * scale, 1e-13 * expected) << numel;
    EXPECT_EQ(squared_sum_by_blocks({{moved.data() + 1, numel, scale, type, 0}}), sum) << numel;
  }
}

TEST(KernelSquaredSum, EqualsF64AndDoesNotDependOnAlignment) {
  compare_squared_sums<float>(DEEPCOMPILE_CUDA_F32);
  compare_squared_sums<Bf16>(DEEPCOMPILE_CUDA_BF16);
  compare_squared_sums<F16>(DEEPCOMPILE_CUDA_F16);
  compare_squared_sums<double>(DEEPCOMPILE_CUDA_F64);
}

TEST(KernelSquaredSum, ManyGradientsOfAllTypesInSeveralLaunches) {
  std::vector<float> ones(5000, 1.0f);
  std::vector<double> wide(70'000, 1.0);
  std::vector<GradientArgument> gradients;
  double expected = 0.0;
  for (int i = 0; i < 300; ++i) {
    const int64_t numel = i % 7 ? 13 * i : 0;
    gradients.push_back({ones.data() + i % 5, numel, 2.0, DEEPCOMPILE_CUDA_F32, 0});
    expected += 4.0 * static_cast<double>(numel);
  }
  gradients.push_back({wide.data(), 70'000, 1.0, DEEPCOMPILE_CUDA_F64, 0});
  EXPECT_EQ(squared_sum_by_blocks(gradients), expected + 70'000.0);
  EXPECT_EQ(squared_sum_by_blocks({}), 0.0);
  gradients[1].type = DEEPCOMPILE_CUDA_NONE;
  EXPECT_EQ(check_gradients(gradients.data(), 2), DEEPCOMPILE_CUDA_BAD_TYPE);
  gradients[1] = {nullptr, 1, 1.0, DEEPCOMPILE_CUDA_F32, 0};
  EXPECT_EQ(check_gradients(gradients.data(), 2), DEEPCOMPILE_CUDA_BAD_POINTER);
}

SumArgument sum_of(const std::vector<const void*>& pieces, void* out, int64_t numel) {
  SumArgument sum = {};
  std::copy(pieces.begin(), pieces.end(), sum.pieces);
  sum.out = out;
  sum.numel = numel;
  return sum;
}

// The number of launches. With a scale: into totals.
template <typename T, int kCount>
int sum_by_blocks(const std::vector<SumArgument>& sums, int64_t pieces, int type,
                  std::optional<double> scale = {}) {
  const auto count = static_cast<int64_t>(sums.size());
  EXPECT_EQ(check_sums(sums.data(), count, pieces, type, scale.has_value()), 0);
  int launches = 0;
  const auto launch = [&](const PieceTable& table, uint32_t blocks) {
    ++launches;
    for (uint32_t block = 0; block < blocks; ++block) {
      for (int thread = 0; thread < kPieceThreads; ++thread) {
        if (scale) {
          piece_sum_of_table<T, kCount, true>(table, block, thread);
        } else {
          piece_sum_of_table<T, kCount, false>(table, block, thread);
        }
      }
    }
    return 0;
  };
  const int64_t chunk = scale ? kPieceChunk<T, true> : kPieceChunk<T, false>;
  EXPECT_EQ(for_each_piece_table(sums.data(), count, pieces, scale.value_or(1), chunk, launch), 0);
  return launches;
}

// Two sums into a total, the first over what was there. `sums`: of the pieces.
template <typename T, int kCount>
void compare_totals(int type, const std::vector<const void*>& pieces,
                    const std::vector<Wide<T>>& sums, int offset) {
  struct alignas(16) Aligned {
    Wide<T> at[16 / sizeof(Wide<T>)];
  };
  const auto numel = static_cast<int64_t>(sums.size());
  std::vector<Aligned> memory((sums.size() + static_cast<size_t>(offset)) * sizeof(Wide<T>) / 16 +
                              1);
  Wide<T>* const total = memory.front().at + offset;
  std::fill(total, total + numel, std::numeric_limits<Wide<T>>::quiet_NaN());
  SumArgument sum = sum_of(pieces, total, numel);
  const double scale = 1.0 / 3;
  std::vector<Wide<T>> expected;
  for (const bool first : {true, false}) {
    sum.first = first ? 1 : 0;
    sum_by_blocks<T, kCount>({sum}, static_cast<int64_t>(pieces.size()), type, scale);
    for (size_t i = 0; i < sums.size(); ++i) {
      const Wide<T> more = sums[i] * static_cast<Wide<T>>(scale);
      if (first) {
        expected.push_back(more);
      } else {
        expected[i] += more;
      }
      ASSERT_EQ(total[i], expected[i]) << numel << " elements, element " << i;
    }
  }
}

template <typename T, int kCount>
void compare_piece_sums(int type, int count) {
  struct alignas(16) Aligned {
    T at[16 / sizeof(T)];
  };
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  const int64_t chunk = kPieceChunk<T, false>;  // a multiple of a total's
  static_assert(kPieceChunk<T, false> % kPieceChunk<T, true> == 0);
  for (const int64_t numel : {int64_t{1}, int64_t{7}, chunk - 1, chunk, 2 * chunk + 3}) {
    for (const int offset : {0, 1}) {
      const auto groups = static_cast<size_t>((numel + offset) * sizeof(T) / 16 + 1);
      std::vector<std::vector<Aligned>> arrays(static_cast<size_t>(count) + 1);
      std::vector<const void*> pieces;
      for (auto& array : arrays) array.resize(groups);
      for (int p = 0; p < count; ++p) {
        T* const piece = arrays[p].front().at + offset;
        for (int64_t i = 0; i < numel; ++i) set(normal(random), piece + i);
        pieces.push_back(piece);
      }
      T* const out = arrays[count].front().at + offset;
      const SumArgument sum = sum_of(pieces, out, numel);
      EXPECT_EQ(piece_sum(sum, count).aligned, offset == 0);
      sum_by_blocks<T, kCount>({sum}, count, type);
      std::vector<Wide<T>> expected;
      for (int64_t i = 0; i < numel; ++i) {
        auto sum = wide(static_cast<const T*>(pieces[0])[i]);
        for (int p = 1; p < count; ++p) sum += wide(static_cast<const T*>(pieces[p])[i]);
        T rounded;
        narrow(sum, &rounded);
        expected.push_back(wide(rounded));
        ASSERT_EQ(wide(out[i]), expected.back()) << numel << " elements, element " << i;
      }
      compare_totals<T, kCount>(type, pieces, expected, offset);
    }
  }
}

TEST(KernelPieceSum, AddsUpInOrderAndRoundsOnce) {
  compare_piece_sums<float, 2>(DEEPCOMPILE_CUDA_F32, 2);
  compare_piece_sums<double, 0>(DEEPCOMPILE_CUDA_F64, 3);
  compare_piece_sums<F16, 4>(DEEPCOMPILE_CUDA_F16, 4);
  compare_piece_sums<Bf16, 2>(DEEPCOMPILE_CUDA_BF16, 2);
  compare_piece_sums<Bf16, 8>(DEEPCOMPILE_CUDA_BF16, 8);
  compare_piece_sums<Bf16, 0>(DEEPCOMPILE_CUDA_BF16, kMaxPieces);
}

TEST(KernelPieceSum, ManySumsInSeveralLaunches) {
  constexpr int kMany = 2 * kSums + 3;
  const int64_t largest = 2 * kPieceChunk<float, false> + 1;
  std::vector<float> ones(static_cast<size_t>(largest), 1.0f);
  std::vector<std::vector<float>> outs;
  std::vector<SumArgument> sums;
  for (int i = 0; i < kMany; ++i) {
    outs.emplace_back(static_cast<size_t>(i == 5 ? largest : i), -1.0f);
  }
  for (auto& out : outs) {
    const std::vector<const void*> pieces(static_cast<size_t>(3), ones.data());
    sums.push_back(sum_of(pieces, out.data(), static_cast<int64_t>(out.size())));
  }
  const int launches = sum_by_blocks<float, 0>(sums, 3, DEEPCOMPILE_CUDA_F32);
  EXPECT_EQ(launches, 3);
  for (const auto& out : outs) EXPECT_EQ(out, std::vector<float>(out.size(), 3.0f));
  EXPECT_EQ((sum_by_blocks<float, 0>({}, 3, DEEPCOMPILE_CUDA_F32)), 0);
}

TEST(KernelPieceSum, RefusesWhatItCannotDo) {
  float values[4] = {};
  SumArgument sum = sum_of({values, values + 1}, values + 3, 1);
  const auto refusal = [&](int64_t pieces, int type, bool totals = false) {
    return check_sums(&sum, 1, pieces, type, totals);
  };
  const int f32 = DEEPCOMPILE_CUDA_F32;
  EXPECT_EQ(refusal(2, f32), 0);
  EXPECT_EQ(refusal(2, DEEPCOMPILE_CUDA_NONE), DEEPCOMPILE_CUDA_BAD_TYPE);
  EXPECT_EQ(refusal(0, f32), DEEPCOMPILE_CUDA_BAD_POINTER);
  EXPECT_EQ(refusal(kMaxPieces + 1, f32), DEEPCOMPILE_CUDA_BAD_POINTER);
  EXPECT_EQ(check_sums(nullptr, 1, 2, f32, false), DEEPCOMPILE_CUDA_BAD_POINTER);
  sum.out = reinterpret_cast<char*>(values + 2) + 2;
  EXPECT_EQ(refusal(2, DEEPCOMPILE_CUDA_BF16), 0);
  EXPECT_EQ(refusal(2, DEEPCOMPILE_CUDA_BF16, /*totals=*/true), DEEPCOMPILE_CUDA_BAD_POINTER);
  sum.numel = -1;
  EXPECT_EQ(refusal(2, f32), DEEPCOMPILE_CUDA_BAD_NUMEL);
  sum = sum_of({values, values + 1}, reinterpret_cast<char*>(values) + 1, 1);
  EXPECT_EQ(refusal(2, f32), DEEPCOMPILE_CUDA_BAD_POINTER);
  sum = sum_of({values, nullptr}, values + 3, 1);
  EXPECT_EQ(refusal(2, f32), DEEPCOMPILE_CUDA_BAD_POINTER);
  sum = sum_of({values, nullptr}, nullptr, 0);
  EXPECT_EQ(refusal(2, f32), 0);  // nothing to do
}

}  // namespace
}  // namespace deepcompile::kernels
