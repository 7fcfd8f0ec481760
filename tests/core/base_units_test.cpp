// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "base/error.h"
#include "base/units.h"
#include "test_support.h"

namespace deepcompile::base_units_test {
namespace {

TEST(Units, PrintsTheLargestUnitThatDivides) {
  EXPECT_EQ(to_string(Bytes{0}), "0B");
  EXPECT_EQ(to_string(Bytes{1}), "1B");
  EXPECT_EQ(to_string(Bytes{1024}), "1KiB");
  EXPECT_EQ(to_string(Bytes{1536}), "1536B");
  EXPECT_EQ(to_string(Bytes{410ll << 20}), "410MiB");
  EXPECT_EQ(to_string(Bytes{3ll << 30}), "3GiB");
  EXPECT_EQ(to_string(Bytes{5ll << 40}), "5TiB");
  EXPECT_EQ(to_string(Bytes{-2048}), "-2KiB");
  EXPECT_EQ(to_string(Nanos{0}), "0ns");
  EXPECT_EQ(to_string(Nanos{7}), "7ns");
  EXPECT_EQ(to_string(Nanos{1'500'000}), "1500us");
  EXPECT_EQ(to_string(Nanos{3'000'000}), "3ms");
  EXPECT_EQ(to_string(Nanos{60'000'000'000}), "60s");
}

TEST(Units, ParsesWhatItPrints) {
  for (int64_t value :
       {int64_t{0}, int64_t{1}, int64_t{999}, int64_t{1000}, int64_t{1024}, int64_t{1536},
        int64_t{1'000'000}, int64_t{1} << 20, int64_t{1} << 40, INT64_MAX}) {
    EXPECT_EQ(parse_bytes(to_string(Bytes{value})), Bytes{value});
    EXPECT_EQ(parse_nanos(to_string(Nanos{value})), Nanos{value});
  }
}

TEST(Units, ParsesFractionsThatComeToAWholeNumber) {
  EXPECT_EQ(parse_nanos("3.2ms"), Nanos{3'200'000});
  EXPECT_EQ(parse_nanos("0.5us"), Nanos{500});
  EXPECT_EQ(parse_bytes("1.5KiB"), Bytes{1536});
  EXPECT_EQ(parse_bytes("1.500000000000KiB"), Bytes{1536});
}

TEST(Units, RoundsForPeople) {
  EXPECT_EQ(pretty(Bytes{0}), "0 B");
  EXPECT_EQ(pretty(Bytes{512}), "512 B");
  EXPECT_EQ(pretty(Bytes{1536}), "1.50 KiB");
  EXPECT_EQ(pretty(Bytes{1'567'663'063}), "1.46 GiB");
  EXPECT_EQ(pretty(Bytes{410ll << 20}), "410 MiB");
  EXPECT_EQ(pretty(Bytes{-1536}), "-1.50 KiB");
  EXPECT_EQ(pretty(Nanos{3'200'000}), "3.20 ms");
  EXPECT_EQ(pretty(Nanos{45'670'000}), "45.7 ms");
  EXPECT_EQ(pretty(Nanos{999}), "999 ns");
  EXPECT_EQ(pretty(Nanos{999'999}), "1.00 ms");
}

TEST(Units, SaysWhatIsWrong) {
  EXPECT_EQ(error_of([] { parse_bytes("12"); }),
            "[base] size '12': has no unit (B, KiB, MiB, GiB, TiB). Write it as in 512B, 64KiB or "
            "1.5GiB.");
  EXPECT_EQ(error_of([] { parse_bytes("12MB"); }),
            "[base] size '12MB': unit 'MB' is none of B, KiB, MiB, GiB, TiB. Write it as in 512B, "
            "64KiB or 1.5GiB.");
  EXPECT_EQ(error_of([] { parse_bytes("-1B"); }),
            "[base] size '-1B': does not begin with a number. Write it as in 512B, 64KiB or "
            "1.5GiB.");
  EXPECT_EQ(error_of([] { parse_nanos("0.5ns"); }),
            "[base] time '0.5ns': is not a whole number of ns. Write it as in 7ns, 1500us or "
            "3.2ms.");
  EXPECT_EQ(error_of([] { parse_nanos("9223372036854775807s"); }),
            "[base] time '9223372036854775807s': is too large. Write it as in 7ns, 1500us or "
            "3.2ms.");
  EXPECT_EQ(error_of([] { parse_nanos("99999999999999999999ns"); }),
            "[base] time '99999999999999999999ns': too many digits. Write it as in 7ns, 1500us or "
            "3.2ms.");
}

TEST(Error, AFailedCheckNamesItsPlace) {
  try {
    DC_CHECK(1 > 2, "numbers are broken");
    FAIL() << "did not throw";
  } catch (const InternalError& error) {
    const std::string text = error.what();
    EXPECT_TRUE(text.starts_with("[internal] ")) << text;
    EXPECT_NE(text.find("base_units_test.cpp:"), std::string::npos) << text;
    EXPECT_NE(text.find("numbers are broken (1 > 2 does not hold)"), std::string::npos) << text;
  }
}

}  // namespace
}  // namespace deepcompile::base_units_test
