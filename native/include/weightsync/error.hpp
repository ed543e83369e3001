// The one exception of the native code. Bindings translate it once, by scope.
#pragma once

#include <cstdint>
#include <exception>
#include <source_location>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace weightsync {

// What must be rebuilt to go on; each has one class in weightsync/errors.py (see py_errors.cpp).
enum class Scope : std::uint8_t {
    kConfig,     // wrong input, nothing was changed
    kTransfer,   // moving bytes failed and no narrower scope fits
    kTimeout,    // a deadline passed
    kQueuePair,  // one queue pair
    kRail,       // one rail
    kPeer,       // a peer is gone
    kMemory,     // memory cannot be registered, mapped or attached
    kFenced,     // a member of an old generation tried to go on
    kDtype,      // no cast leads from one dtype to the other
    kAuth,       // a peer is not who it must be
    kInternal,   // our bug
};
inline constexpr int kNumScopes = static_cast<int>(Scope::kInternal) + 1;

// Facts of an error by name: they become attributes of the Python exception.
using Fact = std::variant<std::int64_t, std::string, std::vector<std::int64_t>>;
using Facts = std::vector<std::pair<std::string, Fact>>;

class Error : public std::exception {
  public:
    Error(Scope scope, std::string detail, Facts facts = {},
          std::source_location where = std::source_location::current())
        : scope_(scope), detail_(std::move(detail)), facts_(std::move(facts)), where_(where) {}

    [[nodiscard]] Scope scope() const noexcept { return scope_; }
    [[nodiscard]] const std::string& detail() const noexcept { return detail_; }
    [[nodiscard]] const Facts& facts() const noexcept { return facts_; }
    [[nodiscard]] const char* what() const noexcept override { return detail_.c_str(); }
    // The same error, of the same place in our sources, in other words.
    [[nodiscard]] Error with_detail(std::string detail) const {
        return Error(scope_, std::move(detail), facts_, where_);
    }
    // "board.cpp:123": where in our sources it was thrown.
    [[nodiscard]] std::string where() const;

  private:
    Scope scope_;
    std::string detail_;
    Facts facts_;
    std::source_location where_;
};

// "EPERM (Operation not permitted)"
[[nodiscard]] std::string errno_text(int error);

// Error of a failed system call, with .errno and .call.
[[nodiscard]] Error os_error(Scope scope, std::string_view call, int error, std::string_view advice,
                             std::source_location where = std::source_location::current());

// Destructors cannot throw: they report here, and nothing is dropped silently. The default writes
// one line to stderr; tests install their own. Safe from any thread.
using Reporter = void (*)(const char* message) noexcept;
void set_reporter(Reporter reporter) noexcept;
void report(const std::string& message) noexcept;

}  // namespace weightsync
