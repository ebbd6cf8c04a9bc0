#include <algorithm>
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
        uint32_t found = MergeTable::kNone;
        for (size_t i = 0; i + 1 < ids.size(); ++i) {
            const uint32_t number = table.find(ids[i], ids[i + 1]);
            if (number != MergeTable::kNone &&
                (found == MergeTable::kNone || table.rank(number) < table.rank(found))) {
                best = i;
                found = number;
            }
        }
        if (best == ids.size()) return ids;
        ids[best] = table.result(found);
        ids.erase(ids.begin() + std::ptrdiff_t(best) + 1);
    }
}

}  // namespace

TEST(table_finds_what_was_added) {
    std::vector<uint32_t> results(1000);
    for (uint32_t i = 0; i < 1000; ++i) results[i] = i + 5000;
    for (const bool known_size : {true, false}) {
        MergeTable table(known_size ? results : std::vector<uint32_t>{});
        for (uint32_t i = 0; i < 1000; ++i) table.add(i, i * 7 + 1, i);
        table.add(3, 22, 0);  // the first of a pair stays
        for (uint32_t i = 0; i < 1000; ++i) {
            CHECK_EQ(table.find(i, i * 7 + 1), i);
            if (known_size) CHECK_EQ(table.result(i), i + 5000);
            CHECK_EQ(table.find(i, i * 7 + 2), MergeTable::kNone);
        }
    }
}

TEST(the_table_takes_no_more_than_its_bits_hold) {
    MergeTable table({1});
    table.add(MergeTable::kMaxSymbol, MergeTable::kMaxSymbol, 0);
    CHECK_EQ(table.find(MergeTable::kMaxSymbol, MergeTable::kMaxSymbol), 0u);
    CHECK_THROWS(table.add(MergeTable::kMaxSymbol + 1, 0, 0), "symbols");
    CHECK_THROWS(MergeTable(std::vector<uint32_t>(MergeTable::kNone + 1u)), "too many merges");
}

TEST(merges_equal_the_definition) {
    std::mt19937 random(1);
    for (int round = 0; round < 300; ++round) {
        const auto symbols = uint32_t(2 + random() % 6);
        std::vector<uint32_t> results(30), ranks(30);
        for (uint32_t i = 0; i < 30; ++i) results[i] = symbols + i;
        std::shuffle(results.begin(), results.end(), random);
        // Some ranks are shared: then the leftmost pair must win.
        const bool shared = round % 2 == 0;
        for (uint32_t& rank : ranks) rank = uint32_t(random() % 12);
        std::sort(ranks.begin(), ranks.end());
        MergeTable table(results, shared ? ranks : std::vector<uint32_t>{});
        for (uint32_t number = 0; number < 30; ++number)
            table.add(uint32_t(random() % results[number]), uint32_t(random() % results[number]),
                      number);
        BpeMerger merger;
        for (const size_t length :
             {size_t(0), size_t(1), size_t(2), size_t(9), size_t(62), size_t(63), size_t(200)}) {
            std::vector<uint32_t> ids(length);
            for (uint32_t& id : ids) id = uint32_t(random() % symbols);
            const std::vector<uint32_t> expected = merge_by_definition(table, ids);
            merger.merge(table, ids);
            CHECK_EQ(ids, expected);
        }
    }
}

TEST(a_long_run_takes_no_quadratic_time) {
    MergeTable table({1, 2});
    table.add(0, 0, 0);
    table.add(1, 1, 1);
    std::vector<uint32_t> ids(2000000, 0);
    BpeMerger merger;
    merger.merge(table, ids);
    CHECK_EQ(ids.size(), size_t(500000));
}

TEST_MAIN()
