// The greedy rule of a blend, in one thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

namespace fastllm::blending {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Datasets of equal weight are one group. Their errors differ by their counts alone, so they are
// drawn in turns, in the order of their numbers, and the group acts as one dataset whose number is
// that of the member whose turn it is.
struct Groups {
    std::vector<double> weight;   // of each group, falling
    std::vector<double> drawn;    // samples drawn from the member whose turn it is
    std::vector<double> limit;    // of samples of each member
    std::vector<uint32_t> begin;  // of its members
    std::vector<uint32_t> end;
    std::vector<uint32_t> turn;     // position in `members`
    std::vector<uint16_t> members;  // dataset numbers, by group, rising

    // sizes: samples of each dataset, drawn without replacement; null: any number.
    Groups(const double* weights, const int64_t* sizes, size_t datasets) : members(datasets) {
        std::iota(members.begin(), members.end(), uint16_t(0));
        std::stable_sort(members.begin(), members.end(),
                         [&](uint16_t a, uint16_t b) { return weights[a] > weights[b]; });
        for (uint32_t i = 0; i < datasets; ++i) {
            const uint16_t j = members[i];
            if (sizes && sizes[j] == 0) break;  // the lowest weight, 0: never drawn
            if (i == 0 || weights[j] != weight.back()) {
                weight.push_back(weights[j]);
                limit.push_back(sizes ? double(sizes[j]) : kInfinity);
                begin.push_back(i);
                end.push_back(i);
            }
            ++end.back();
        }
        drawn.assign(weight.size(), 0.0);
        turn = begin;
    }
    size_t size() const { return weight.size(); }
    uint16_t dataset(uint32_t g) const { return members[turn[g]]; }

    // Sets what has been drawn from the group in all.
    void set_drawn(uint32_t g, int64_t total) {
        const int64_t count = end[g] - begin[g];
        drawn[g] = double(total / count);
        turn[g] = begin[g] + uint32_t(total % count);
        if (drawn[g] >= limit[g]) drawn[g] = kInfinity;
    }

    // Samples drawn from every dataset.
    std::vector<int64_t> counts() const {
        std::vector<int64_t> found(members.size(), 0);
        for (uint32_t g = 0; g < size(); ++g)
            for (uint32_t i = begin[g]; i < end[g]; ++i)
                found[members[i]] = int64_t(std::min(drawn[g], limit[g])) + (i < turn[g]);
        return found;
    }
};

// Runs the rule over a few candidates instead of all groups.
//
// A floor rises over time on a straight line. Candidates are all groups whose error is not below
// the floor: the best candidate is the best of all as long as its error is at the floor or above.
// Between draws a group's error rises by its weight each step, so the step at which it reaches the
// floor is known when it is drawn; a calendar makes it a candidate in that step or before. When the
// best candidate falls below the floor, and every so often, the floor is chosen anew.
class Blender {
  public:
    // first: the step that comes next, which is how many samples the groups have given.
    Blender(Groups groups, size_t first)
        : groups_(std::move(groups)),
          step_(first),
          steps_(std::clamp<int64_t>(int64_t(groups_.size()) / 8, 64, kSlots * kStepsPerSlot)),
          width_(8.0 / double(groups_.size())),
          next_due_(groups_.size()),
          soon_(groups_.size()),
          candidate_weight_(groups_.size() + kStride),
          candidate_drawn_(groups_.size() + kStride),
          candidate_error_(groups_.size() + kStride),
          candidate_group_(groups_.size() + kStride) {
        const double x = at(step_);
        since_ = x;
        rebuild(x, best_of_all(x));
    }

    const Groups& groups() const { return groups_; }

    // Draws that many samples; the results begin at these places.
    void run(size_t samples, int16_t* dataset_index, int64_t* dataset_sample_index) {
        for (size_t i = 0; i < samples; ++i, ++step_) {
            const double x = at(step_);
            admit_due(x);
            double best = furthest_behind(x);
            if (best < floor_at(x)) {
                width_ *= 1.5;
                rebuild(x, best_of_all(x));
                best = furthest_behind(x);
            } else if (x >= rebuild_at_ || (count_ > kManyCandidates && x > since_ + 16)) {
                rebuild(x, best);
                best = furthest_behind(x);
            }
            const size_t c = first_with(best);
            const uint32_t g = candidate_group_[c];
            dataset_index[i] = int16_t(groups_.dataset(g));
            dataset_sample_index[i] = int64_t(groups_.drawn[g]);
            if (++groups_.turn[g] == groups_.end[g]) next_round(c, g, x);
        }
    }

  private:
    static constexpr size_t kStride = 4;  // candidates compared in one turn of the loop
    // The calendar: slots of some steps, each with a list of the groups due in it.
    static constexpr int64_t kSlots = 128;
    static constexpr int64_t kStepsPerSlot = 4;
    static constexpr uint32_t kNobody = 0xFFFFFFFFu;
    static constexpr size_t kFewGroups = 16;  // all of them are candidates
    static constexpr size_t kManyCandidates = 96;
    static constexpr size_t kEnoughCandidates = 32;
    static constexpr double kLeastWidth = 1e-9;  // of the band between floor and best error

    static double at(size_t step) { return double(std::max<size_t>(step, 1)); }
    double floor_at(double x) const { return floor_ + slope_ * (x - since_); }

    void rebuild(double x, double best) {
        choose_floor(x, best);
        // Covers the rounding of w·x, of w·x − count and of what is computed from them here.
        margin_ = (x + double(steps_)) * 1e-15 * std::max(1.0, groups_.weight[0]);
        for (int tries = 0;; ++tries) {
            std::fill(due_, due_ + kSlots, kNobody);
            count_ = 0;
            slot_ = 0;
            const size_t soon = reaching_floor(x);
            for (size_t i = 0; i < soon; ++i) {
                const uint32_t g = soon_[i];
                if (!put_on_calendar(g, groups_.weight[g] * x - groups_.drawn[g], x)) admit(g);
            }
            if (count_ <= kEnoughCandidates || tries == 4) break;
            width_ *= 0.5;
            floor_ = best - width_;
        }
        pad();
    }

    double best_of_all(double x) const {
        double best[kStride] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity};
        const size_t size = groups_.size();
        for (size_t g = 0; g < size; ++g) {
            const double error = groups_.weight[g] * x - groups_.drawn[g];
            best[g % kStride] = std::max(best[g % kStride], error);
        }
        return std::max(std::max(best[0], best[1]), std::max(best[2], best[3]));
    }

    // Low enough to leave some candidates in reserve; rising with the best error where that rises,
    // as it does while many groups of nearly equal weight are drawn in turns.
    void choose_floor(double x, double best) {
        const double rise = (best - best_) / (x - since_);
        slope_ = x > since_ && rise > 0.25 / double(groups_.size()) ? rise : 0.0;
        best_ = best;
        since_ = x;
        rebuild_at_ = x + double(steps_);
        width_ = std::max(0.9 * width_, kLeastWidth);
        floor_ = best - width_;
        if (groups_.size() <= kFewGroups) {
            floor_ = -kInfinity;
            slope_ = 0;
            rebuild_at_ = kInfinity;
        }
    }

    // Lists in soon_ the groups that may reach the floor before it is chosen again.
    size_t reaching_floor(double x) {
        const double then = x + double(steps_), level = floor_ - margin_;
        const double *const weight = groups_.weight.data(), *const drawn = groups_.drawn.data();
        uint32_t* const list = soon_.data();
        const size_t size = groups_.size();
        size_t soon = 0;
        for (size_t g = 0; g < size; ++g) {
            list[soon] = uint32_t(g);
            soon += weight[g] * then - drawn[g] >= level;
        }
        return soon;
    }

    // Whether the group is certain to stay below the floor until its slot comes; else it must be a
    // candidate at once.
    bool put_on_calendar(uint32_t g, double error, double x) {
        const double gap = floor_at(x) - margin_ - error;
        if (!(gap > 0)) return false;
        const double rate = groups_.weight[g] - slope_;
        // Not before all groups are looked at again?
        if (gap >= rate * (rebuild_at_ - x)) return true;
        const int64_t slot = int64_t(x - since_ + gap / rate * (1 - 1e-12) - 1) / kStepsPerSlot;
        if (slot < slot_) return false;
        next_due_[g] = due_[slot];
        due_[slot] = g;
        return true;
    }

    void admit_due(double x) {
        if (double(slot_ * kStepsPerSlot) > x - since_ || slot_ == kSlots) return;
        while (double(slot_ * kStepsPerSlot) <= x - since_ && slot_ < kSlots) {
            for (uint32_t g = due_[slot_]; g != kNobody; g = next_due_[g]) admit(g);
            ++slot_;
        }
        pad();
    }

    void admit(uint32_t g) {
        candidate_weight_[count_] = groups_.weight[g];
        candidate_drawn_[count_] = groups_.drawn[g];
        candidate_group_[count_] = g;
        ++count_;
    }
    // Errors of −∞ behind the last candidate.
    void pad() {
        for (size_t i = count_; i < count_ + kStride - 1; ++i) {
            candidate_weight_[i] = 0;
            candidate_drawn_[i] = kInfinity;
        }
    }
    void dismiss(size_t i) {
        --count_;
        candidate_weight_[i] = candidate_weight_[count_];
        candidate_drawn_[i] = candidate_drawn_[count_];
        candidate_group_[i] = candidate_group_[count_];
        candidate_weight_[count_] = 0;
        candidate_drawn_[count_] = kInfinity;
    }

    // Errors of all candidates; returns the largest.
    double furthest_behind(double x) {
        const double *const weight = candidate_weight_.data(), *const drawn =
                                                                   candidate_drawn_.data();
        double* const errors = candidate_error_.data();
        double best[kStride] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity};
        for (size_t i = 0; i < count_; i += kStride)
            for (size_t k = 0; k < kStride; ++k) {
                const double error = weight[i + k] * x - drawn[i + k];
                errors[i + k] = error;
                best[k] = error > best[k] ? error : best[k];
            }
        return std::max(std::max(best[0], best[1]), std::max(best[2], best[3]));
    }

    // The candidate of the largest error; of several, that whose dataset has the lowest number.
    size_t first_with(double largest) const {
        const double* const errors = candidate_error_.data();
        uint64_t hits = 0, sum = 0;
        for (size_t i = 0; i < count_; i += kStride)
            for (size_t k = 0; k < kStride; ++k) {
                const uint64_t hit = errors[i + k] >= largest ? ~uint64_t(0) : 0;
                hits -= hit;
                sum += hit & (i + k);
            }
        return hits == 1 ? sum : first_of_equals(largest);
    }
    size_t first_of_equals(double largest) const {
        size_t found = 0;
        uint32_t dataset = kNobody;
        for (size_t i = 0; i < count_; ++i) {
            if (candidate_error_[i] < largest) continue;
            const uint32_t number = groups_.dataset(candidate_group_[i]);
            if (number >= dataset) continue;
            dataset = number;
            found = i;
        }
        return found;
    }

    // Every member of the group of candidate i has been drawn once more.
    void next_round(size_t i, uint32_t g, double x) {
        groups_.turn[g] = groups_.begin[g];
        groups_.drawn[g] += 1.0;
        if (groups_.drawn[g] >= groups_.limit[g]) {
            groups_.drawn[g] = kInfinity;  // an error of −∞: never drawn again
            dismiss(i);
        } else if (put_on_calendar(g, groups_.weight[g] * x - groups_.drawn[g], x)) {
            dismiss(i);
        } else {
            candidate_drawn_[i] = groups_.drawn[g];
        }
    }

    Groups groups_;
    size_t step_;
    int64_t steps_;  // from one choice of the floor to the next
    double floor_ = 0, slope_ = 0, since_ = 0, rebuild_at_ = 0, margin_ = 0, best_ = 0, width_;
    uint32_t due_[kSlots];
    std::vector<uint32_t> next_due_;
    int64_t slot_ = 0;  // slots before it have been admitted
    std::vector<uint32_t> soon_;
    // Candidates, in no order; the first count_ of them.
    std::vector<double> candidate_weight_, candidate_drawn_, candidate_error_;
    std::vector<uint32_t> candidate_group_;
    size_t count_ = 0;
};

}  // namespace fastllm::blending
