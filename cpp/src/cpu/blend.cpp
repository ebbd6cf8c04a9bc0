// Large blends are made in parts, one a thread, although each step depends on all before it.
//
// What is known about step t beforehand is nearly everything: each dataset has been drawn about
// weight·t times. A part starts from such a guess some thousand steps early. A dataset drawn once
// too seldom in the guess is among the furthest behind and so is drawn soon, one drawn too often
// waits, and the run falls in with the true one. Whether it did is seen, not hoped for: the counts
// at its start must be those of the true run, which determine all that follows. Where they are not,
// the true run is continued into the part until they are.
#include "fastllm/blend.hpp"

#include <algorithm>
#include <functional>
#include <future>
#include <memory>
#include <numeric>
#include <vector>

#include "blender.hpp"

namespace fastllm {
namespace {

using blending::Blender;
using blending::Groups;
using Counts = std::vector<int64_t>;

constexpr size_t kLeastPart = 1 << 20;  // samples: below, a thread of its own does not pay
constexpr size_t kMostParts = 16;
constexpr size_t kEarlyPerDataset = 16;  // steps of a part before it counts
constexpr size_t kRepairStride = 4096;   // steps

struct Samples {
    int16_t* dataset;
    int64_t* number;
    Samples operator+(size_t i) const { return {dataset + i, number + i}; }
};

// Sets what the groups have given before the step to what it must be, give or take one: the whole
// part of size·weight·step, and one more for those with the largest remainder. False if that does
// not add up, as with weights that do not sum to 1.
bool guess_drawn(Groups& groups, size_t step) {
    std::vector<double> remainder(groups.size());
    std::vector<int64_t> total(groups.size());
    int64_t missing = int64_t(step);
    for (uint32_t g = 0; g < groups.size(); ++g) {
        const double count = double(groups.end[g] - groups.begin[g]);
        const double expected = std::min(groups.weight[g] * double(step), groups.limit[g]) * count;
        if (!(expected < 0x1p53)) return false;
        total[g] = int64_t(expected);
        remainder[g] = expected < groups.limit[g] * count ? expected - double(total[g]) : -1.0;
        missing -= total[g];
    }
    if (missing < 0 || missing > int64_t(groups.size())) return false;
    std::vector<uint32_t> order(groups.size());
    std::iota(order.begin(), order.end(), 0u);
    std::nth_element(order.begin(), order.begin() + missing, order.end(),
                     [&](uint32_t a, uint32_t b) { return remainder[a] > remainder[b]; });
    for (int64_t i = 0; i < missing; ++i) {
        if (remainder[order[size_t(i)]] < 0) return false;
        ++total[order[size_t(i)]];
    }
    for (uint32_t g = 0; g < groups.size(); ++g) groups.set_drawn(g, total[g]);
    return true;
}

struct Part {
    size_t begin, end;
    std::unique_ptr<Blender> blender;
    Counts start;  // what had been drawn before `begin`
};

// Writes samples begin to end as they are if the guess was right. Its first steps are written over.
void run_guessed(Part& part, size_t early, Samples out) {
    part.blender->run(early, (out + part.begin).dataset, (out + part.begin).number);
    part.start = part.blender->groups().counts();
    part.blender->run(part.end - part.begin, (out + part.begin).dataset, (out + part.begin).number);
}

// Continues the true run into a part until the part's own counts are the same. True if that happens
// before the part's end; all of its samples are right in either case.
bool repair(Blender& truth, const Part& part, Samples out) {
    Counts ahead = truth.groups().counts();  // of the part's run
    std::transform(ahead.begin(), ahead.end(), part.start.begin(), ahead.begin(), std::minus<>());
    auto differing =
        size_t(ahead.end() - ahead.begin() - std::count(ahead.begin(), ahead.end(), int64_t(0)));
    std::vector<int16_t> dataset(kRepairStride);
    std::vector<int64_t> number(kRepairStride);
    const auto add = [&](int16_t j, int64_t change) {
        int64_t& of = ahead[size_t(j)];
        differing -= of != 0;
        of += change;
        differing += of != 0;
    };
    for (size_t t = part.begin; differing != 0 && t < part.end; t += kRepairStride) {
        const size_t count = std::min(kRepairStride, part.end - t);
        truth.run(count, dataset.data(), number.data());
        for (size_t i = 0; i < count && differing != 0; ++i) {
            const Samples was = out + (t + i);
            add(dataset[i], 1);
            add(*was.dataset, -1);
            *was.dataset = dataset[i];
            *was.number = number[i];
        }
    }
    return differing == 0;
}

void run_in_parts(const Groups& groups, size_t samples, size_t parts, Samples out) {
    const size_t early = kEarlyPerDataset * groups.members.size();
    std::vector<Part> all(parts);
    for (size_t p = 0; p < parts; ++p) {
        all[p].begin = samples * p / parts;
        all[p].end = samples * (p + 1) / parts;
        Groups start = groups;
        const size_t from = p == 0 ? 0 : all[p].begin - early;
        if (p != 0 && !guess_drawn(start, from)) return run_in_parts(groups, samples, 1, out);
        all[p].blender = std::make_unique<Blender>(std::move(start), from);
    }
    std::vector<std::future<void>> running;
    for (size_t p = 1; p < parts; ++p)
        running.push_back(
            std::async(std::launch::async, [&, p] { run_guessed(all[p], early, out); }));
    all[0].blender->run(all[0].end, out.dataset, out.number);
    for (std::future<void>& part : running) part.get();
    Blender* truth = all[0].blender.get();
    for (size_t p = 1; p < parts; ++p)
        if (repair(*truth, all[p], out)) truth = all[p].blender.get();
}

void run(const Groups& groups, size_t samples, int threads, Samples out) {
    size_t parts = std::min({size_t(std::max(threads, 1)), samples / kLeastPart, kMostParts});
    // A part must be much longer than its early steps.
    parts = std::min(parts, samples / (8 * kEarlyPerDataset * groups.members.size()));
    run_in_parts(groups, samples, std::max<size_t>(parts, 1), out);
}

}  // namespace

void build_blend(const double* weights, size_t datasets, size_t samples, int16_t* dataset_index,
                 int64_t* dataset_sample_index, int threads) {
    run(Groups(weights, nullptr, datasets), samples, threads,
        {dataset_index, dataset_sample_index});
}

void build_exhaustive_blend(const int64_t* sizes, size_t datasets, int16_t* dataset_index,
                            int64_t* dataset_sample_index, int threads) {
    const int64_t total = std::accumulate(sizes, sizes + datasets, int64_t(0));
    std::vector<double> weights(datasets);
    for (size_t j = 0; j < datasets; ++j) weights[j] = double(sizes[j]) / double(total);
    run(Groups(weights.data(), sizes, datasets), size_t(total), threads,
        {dataset_index, dataset_sample_index});
}

}  // namespace fastllm
