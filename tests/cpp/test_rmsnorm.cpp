#include <cmath>
#include <random>

#include "fastllm/cpu_isa.hpp"
#include "fastllm/rmsnorm.hpp"
#include "test.hpp"

namespace {

using fastllm::DType;
using fastllm::cpu::Isa;

constexpr float kEps = 1e-5f;

std::vector<float> random_floats(std::int64_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& v : values) v = normal(generator);
    return values;
}

struct Case {
    std::int64_t rows, cols;
    std::vector<float> x, weight, dy, dh;

    Case(std::int64_t r, std::int64_t c)
        : rows(r),
          cols(c),
          x(random_floats(r * c, 1)),
          weight(random_floats(c, 2)),
          dy(random_floats(r * c, 3)),
          dh(random_floats(r * c, 4)) {}

    double rstd(std::int64_t row) const {
        double squares = 0;
        for (std::int64_t c = 0; c < cols; ++c) squares += std::pow(x[row * cols + c], 2);
        return 1.0 / std::sqrt(squares / static_cast<double>(cols) + kEps);
    }
};

struct Result {
    std::vector<float> y, rstd, dx, dweight;
};

Result run(const Case& c) {
    Result r;
    r.y.resize(c.rows * c.cols);
    r.rstd.resize(c.rows);
    r.dx.resize(c.rows * c.cols);
    r.dweight.resize(c.cols);
    fastllm::cpu::rmsnorm_fwd({DType::kFloat32, c.rows, c.cols, kEps, c.x.data(), nullptr,
                               c.weight.data(), r.y.data(), nullptr, r.rstd.data()});
    const std::int64_t parts = fastllm::cpu::rmsnorm_bwd_parts(c.rows, c.cols);
    std::vector<float> partial(parts * c.cols, NAN);
    fastllm::cpu::rmsnorm_bwd({DType::kFloat32, c.rows, c.cols, c.dy.data(), c.x.data(),
                               c.weight.data(), r.rstd.data(), c.dh.data(), r.dx.data(),
                               r.dweight.data(), partial.data(), parts});
    return r;
}

double worst_difference(const Case& c, const Result& r) {
    double worst = 0;
    std::vector<double> dweight(c.cols, 0.0);
    for (std::int64_t row = 0; row < c.rows; ++row) {
        const double rstd = c.rstd(row);
        double mean = 0;
        const auto at = [&](std::int64_t col) { return row * c.cols + col; };
        for (std::int64_t i = 0; i < c.cols; ++i) {
            mean += c.dy[at(i)] * c.weight[i] * c.x[at(i)] * rstd / static_cast<double>(c.cols);
        }
        for (std::int64_t i = 0; i < c.cols; ++i) {
            const double normal = c.x[at(i)] * rstd;
            dweight[i] += c.dy[at(i)] * normal;
            const double dx = rstd * (c.dy[at(i)] * c.weight[i] - normal * mean) + c.dh[at(i)];
            worst = std::max(worst, std::fabs(r.y[at(i)] - normal * c.weight[i]));
            worst = std::max(worst, std::fabs(r.dx[at(i)] - dx));
        }
    }
    for (std::int64_t i = 0; i < c.cols; ++i) {
        worst = std::max(worst, std::fabs(r.dweight[i] - dweight[i]));
    }
    return worst;
}

}  // namespace

TEST(every_level_against_double) {
    const Isa before = fastllm::cpu::current_isa();
    for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
        if (!fastllm::cpu::supported(isa)) continue;
        fastllm::cpu::set_isa(isa);
        CHECK_EQ(fastllm::cpu::current_isa() == isa, true);
        for (const auto& [rows, cols] : {std::pair{1, 1}, {3, 7}, {40, 64}, {5, 129}, {2, 1000}}) {
            const Case c(rows, cols);
            CHECK(worst_difference(c, run(c)) < 2e-5);
        }
    }
    fastllm::cpu::set_isa(before);
}

TEST(no_rows) {
    const Result r = run(Case(0, 5));
    CHECK_EQ(r.dweight, std::vector<float>(5, 0.0f));
}

TEST_MAIN()
