#include "fastllm/blend.hpp"
#include "fastllm/gpt_index.hpp"
#include "test.hpp"

using namespace fastllm;

TEST(random_is_numpys) {
    // numpy.random.RandomState(1234).shuffle(numpy.arange(10))
    std::vector<int32_t> items{0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
    LegacyRandom random(1234);
    random.shuffle(items.data(), items.size());
    CHECK_EQ(items, (std::vector<int32_t>{7, 2, 9, 1, 0, 8, 4, 5, 6, 3}));
}

TEST(sample_index_by_hand) {
    // Documents of 3, 0, 4 and 2 tokens; samples of 2 tokens and one label.
    const std::vector<int32_t> lengths{3, 0, 4, 2}, documents{0, 1, 2, 3};
    std::vector<int32_t> rows(2 * 5, -1);
    build_sample_index<int32_t>(lengths.data(), 4, documents.data(), 4, 2, 1, 4, rows.data());
    CHECK_EQ(rows, (std::vector<int32_t>{0, 0, 0, 2, 2, 1, 2, 3, 3, 1}));
}

TEST(sample_index_without_extra_token) {
    const std::vector<int32_t> lengths{3, 5}, documents{0, 1};
    std::vector<int64_t> rows(2 * 5, -1);
    build_sample_index<int64_t>(lengths.data(), 2, documents.data(), 2, 2, 0, 4, rows.data());
    CHECK_EQ(rows, (std::vector<int64_t>{0, 0, 0, 2, 1, 1, 1, 3, 1, 5}));
}

TEST(sample_index_refuses_unknown_documents) {
    const std::vector<int32_t> lengths{3}, documents{1};
    std::vector<int32_t> rows(4);
    CHECK_THROWS(
        (build_sample_index<int32_t>(lengths.data(), 1, documents.data(), 1, 2, 1, 1, rows.data()),
         0),
        "does not exist");
}

TEST(blend_follows_weights) {
    const std::vector<double> weights{0.5, 0.25, 0.25};
    std::vector<int16_t> dataset(8);
    std::vector<int64_t> sample(8);
    build_blend(weights.data(), 3, 8, dataset.data(), sample.data(), 1);
    CHECK_EQ(dataset, (std::vector<int16_t>{0, 1, 2, 0, 0, 1, 2, 0}));
    CHECK_EQ(sample, (std::vector<int64_t>{0, 0, 0, 1, 2, 1, 1, 3}));
}

TEST(exhaustive_blend_draws_each_sample_once) {
    const std::vector<int64_t> sizes{5, 0, 2};
    std::vector<int16_t> dataset(7);
    std::vector<int64_t> sample(7);
    build_exhaustive_blend(sizes.data(), 3, dataset.data(), sample.data(), 1);
    std::vector<int64_t> drawn(3, 0);
    for (size_t t = 0; t < 7; ++t) CHECK_EQ(sample[t], drawn[size_t(dataset[t])]++);
    CHECK_EQ(drawn, sizes);
}

TEST_MAIN()
