// Runs all tests of this folder; built with sanitizers by tests/native/test_sanitizers.py.
#include "check.hpp"

// What sanitizers ask a program for, by these names. libfabric is not built with them.
#define FOR_SANITIZERS extern "C" __attribute__((visibility("default"))) const char*
// Its providers keep what they allocate until the process ends, and lose some of it. What we make
// of libfabric's is counted below.
FOR_SANITIZERS __lsan_default_suppressions();  // NOLINT
FOR_SANITIZERS __lsan_default_suppressions() {
    return "leak:libfabric.so\n";
}
// Its locks are of its own making and cannot be seen, so what it reads and writes looks like races.
FOR_SANITIZERS __tsan_default_suppressions();  // NOLINT
FOR_SANITIZERS __tsan_default_suppressions() {
    return "called_from_lib:libfabric.so\n"
           "mutex:_dl_call_fini\n";  // its own, when it is unloaded
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
