#include "fastllm/packing.hpp"
#include "test.hpp"

using namespace fastllm;

TEST(packs_by_hand) {
    // Longest first: 7 (pack 0), 6 (1), 4 (1 is full), 3 (0 is full), 2 and 2 (2), 1 (2).
    const std::vector<int32_t> lengths{4, 2, 7, 0, 6, 1, 3, 2};
    const Packing packing = pack_best_fit(lengths.data(), lengths.size(), 10);
    CHECK_EQ(packing.items, (std::vector<int64_t>{2, 6, 4, 0, 1, 7, 5}));
    CHECK_EQ(packing.ends, (std::vector<int64_t>{2, 4, 7}));
}

TEST(least_space_that_suffices) {
    // 8, 7 and 5 open packs with 2, 3 and 5 left; 3 goes where 3 are left, not where 5 are.
    const std::vector<int32_t> lengths{8, 7, 5, 3};
    const Packing packing = pack_best_fit(lengths.data(), lengths.size(), 10);
    CHECK_EQ(packing.items, (std::vector<int64_t>{0, 1, 3, 2}));
    CHECK_EQ(packing.ends, (std::vector<int64_t>{1, 3, 4}));
}

TEST(nothing_to_pack) {
    const Packing packing = pack_best_fit(nullptr, 0, 8);
    CHECK_EQ(packing.items, std::vector<int64_t>{});
    CHECK_EQ(packing.ends, std::vector<int64_t>{});
}

TEST(refuses_what_does_not_fit) {
    for (const int32_t length : {-1, 9}) {
        CHECK_THROWS(pack_best_fit(&length, 1, 8), "does not fit 8");
    }
}

TEST_MAIN()
