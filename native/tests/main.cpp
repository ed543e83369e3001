// Runs all tests of this folder; built with sanitizers by tests/native/test_sanitizers.py.
#include "check.hpp"

// Providers of libfabric keep what they allocate until the process ends, and lose some of it. What
// we make of libfabric's is counted below.
extern "C" const char* __lsan_default_suppressions();  // NOLINT: the name is LeakSanitizer's
extern "C" const char* __lsan_default_suppressions() {
    return "leak:libfabric.so\n";
}

int main() {
    using namespace weightsync;
    for (const test::Test& one : test::all_tests()) {
        const std::int64_t before = live_object_count();
        std::printf("%s\n", one.name);
        std::fflush(stdout);
        one.body();
        if (live_object_count() != before) {
            for (std::size_t i = 0; i < kKindNames.size(); ++i) {
                std::fprintf(stderr, "%s: %lld alive\n", std::string(kKindNames[i]).c_str(),
                             static_cast<long long>(live_count(static_cast<Kind>(i))));
            }
            test::fail(one.name, 0, "objects were leaked");
        }
    }
    std::printf("%zu tests passed\n", test::all_tests().size());
    return 0;
}
