#include <random>

#include "fastllm/bpe_merge.hpp"
#include "test.hpp"

using fastllm::BpeMerger;
using fastllm::MergeTable;

namespace {

// The definition, step by step.
std::vector<uint32_t> merge_by_definition(const MergeTable& table, std::vector<uint32_t> ids) {
    while (true) {
        size_t best = ids.size();
        MergeTable::Merge found{MergeTable::kNone, 0};
        for (size_t i = 0; i + 1 < ids.size(); ++i) {
            const auto merge = table.find(ids[i], ids[i + 1]);
            if (merge.rank < found.rank) {
                best = i;
                found = merge;
            }
        }
        if (best == ids.size()) return ids;
        ids[best] = found.id;
        ids.erase(ids.begin() + std::ptrdiff_t(best) + 1);
    }
}

}  // namespace

TEST(table_finds_what_was_added) {
    MergeTable table(4);
    for (uint32_t i = 0; i < 1000; ++i) table.add(i, i * 7 + 1, {i, i + 5000});
    table.add(3, 22, {0, 0});  // the first of a pair stays
    for (uint32_t i = 0; i < 1000; ++i) {
        CHECK_EQ(table.find(i, i * 7 + 1).id, i + 5000);
        CHECK_EQ(table.find(i, i * 7 + 2).rank, MergeTable::kNone);
    }
}

TEST(merges_equal_the_definition) {
    std::mt19937 random(1);
    for (int round = 0; round < 300; ++round) {
        const auto symbols = uint32_t(2 + random() % 6);
        MergeTable table;
        uint32_t next = symbols;
        for (int m = 0; m < 30; ++m) {
            // Some ranks are shared: then the leftmost pair must win.
            table.add(uint32_t(random() % next), uint32_t(random() % next),
                      {uint32_t(random() % 12), next});
            ++next;
        }
        BpeMerger merger;
        for (const size_t length :
             {size_t(0), size_t(1), size_t(2), size_t(9), size_t(48), size_t(49), size_t(200)}) {
            std::vector<uint32_t> ids(length);
            for (uint32_t& id : ids) id = uint32_t(random() % symbols);
            const std::vector<uint32_t> expected = merge_by_definition(table, ids);
            merger.merge(table, ids);
            CHECK_EQ(ids, expected);
        }
    }
}

TEST(a_long_run_takes_no_quadratic_time) {
    MergeTable table;
    table.add(0, 0, {0, 1});
    table.add(1, 1, {1, 2});
    std::vector<uint32_t> ids(2000000, 0);
    BpeMerger merger;
    merger.merge(table, ids);
    CHECK_EQ(ids.size(), size_t(500000));
}

TEST_MAIN()
