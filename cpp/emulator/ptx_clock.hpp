// What a warp or thread knows of what others have done: vector clocks.
//
// Whoever accesses memory is an agent: warps, and what works on their behalf without being ordered
// with them, as copies and tensor-core products do. An agent's index times 32 takes the place of a
// thread in the shadow memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "shadow.hpp"

namespace emulator::ptx {

class Clock {
  public:
    // Whether an access at `when` by `thread` is known to have happened.
    bool knows(unsigned thread, Time when) const {
        const unsigned agent = thread / 32;
        if (agent < agents_.size() && when < agents_[agent]) return true;
        for (const auto& [known, time] : threads_) {
            if (known == thread && when < time) return true;
        }
        return false;
    }

    void learn(unsigned agent, Time before) {
        if (agents_.size() <= agent) agents_.resize(agent + 1, kNever);
        agents_[agent] = std::max(agents_[agent], before);
    }

    // Of one thread of a warp alone.
    void learn_thread(unsigned thread, Time before) {
        for (auto& [known, time] : threads_) {
            if (known != thread) continue;
            time = std::max(time, before);
            return;
        }
        threads_.emplace_back(static_cast<std::uint16_t>(thread), before);
    }

    void join(const Clock& other) {
        if (agents_.size() < other.agents_.size()) agents_.resize(other.agents_.size(), kNever);
        for (std::size_t a = 0; a < other.agents_.size(); ++a) {
            agents_[a] = std::max(agents_[a], other.agents_[a]);
        }
        for (const auto& [thread, time] : other.threads_) learn_thread(thread, time);
        std::erase_if(threads_, [this](const auto& t) {
            const std::size_t agent = t.first / 32u;
            return agent < agents_.size() && t.second <= agents_[agent];
        });
    }

    void clear() {
        agents_.clear();
        threads_.clear();
    }

  private:
    std::vector<Time> agents_;
    std::vector<std::pair<std::uint16_t, Time>> threads_;
};

struct Knowledge {
    Clock done;
    // Of that, what a fence.proxy.async came after: what the asynchronous proxy sees.
    Clock fenced;

    void join(const Knowledge& other) {
        done.join(other.done);
        fenced.join(other.fenced);
    }
    void clear() {
        done.clear();
        fenced.clear();
    }
};

}  // namespace emulator::ptx
