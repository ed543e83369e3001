// A test is a function; CHECK ends the program with the place and the expression.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include <weightsync/engine.hpp>

namespace weightsync::test {

struct Test {
    const char* name;
    void (*body)();
};

inline std::vector<Test>& all_tests() {
    static std::vector<Test> tests;
    return tests;
}

struct Register {
    Register(const char* name, void (*body)()) { all_tests().push_back({name, body}); }
};

[[noreturn]] inline void fail(const char* file, int line, const char* what) {
    std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
    std::abort();
}

// The scope of the error that `call` throws; ends the program when it throws none.
inline Scope scope_of(const std::function<void()>& call) {
    try {
        call();
    } catch (const Error& error) {
        return error.scope();
    }
    fail("scope_of", 0, "no error was thrown");
}

// Deterministic bytes that differ from place to place.
inline std::vector<std::byte> pattern(std::size_t nbytes, unsigned seed) {
    std::vector<std::byte> bytes(nbytes);
    unsigned state = seed * 2654435761U + 1;
    for (std::byte& byte : bytes) {
        state = state * 1664525U + 1013904223U;
        byte = static_cast<std::byte>(state >> 24);
    }
    return bytes;
}

inline std::uint64_t address_of(const std::vector<std::byte>& bytes) {
    return reinterpret_cast<std::uint64_t>(bytes.data());
}

}  // namespace weightsync::test

#define CHECK(condition) \
    ((condition) ? void() : ::weightsync::test::fail(__FILE__, __LINE__, #condition))
#define TEST(name)                                                           \
    static void name();                                                      \
    static const ::weightsync::test::Register register_##name(#name, &name); \
    static void name()
