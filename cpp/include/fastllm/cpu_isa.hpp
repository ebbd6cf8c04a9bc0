// Which vector instructions the CPU operators use. The best level that this processor and operating
// system support is chosen at the first call; every operator is compiled once per level.
#pragma once

namespace fastllm::cpu {

enum class Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

const char* name_of(Isa isa);

// Avx2 stands for x86-64-v3 (with FMA and F16C), Avx512 for x86-64-v4 (F, BW, CD, DQ, VL).
bool supported(Isa isa);

Isa current_isa();

// For tests and measurements. Throws std::invalid_argument when `isa` is not supported here.
void set_isa(Isa isa);

}  // namespace fastllm::cpu
