#include "fastllm/build_info.hpp"
#include "test.hpp"

TEST(version_has_three_parts) {
    int major = -1, minor = -1, patch = -1;
    CHECK_EQ(std::sscanf(fastllm::build_info().version.c_str(), "%d.%d.%d", &major, &minor, &patch),
             3);
}

TEST(cuda_archs_are_listed_only_when_built) {
    const auto info = fastllm::build_info();
    CHECK_EQ(info.cuda, !info.cuda_archs.empty());
    CHECK(info.cuda || info.cutlass_version.empty());
}

TEST(the_portable_level_is_always_built) {
    CHECK(!fastllm::build_info().cpu_built.empty());
    CHECK_EQ(fastllm::build_info().cpu_built.front(), "portable");
}

TEST_MAIN()
