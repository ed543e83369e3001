// Rails as users see them, and the health of the paths that run over them.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace weightsync {

// A path is one rail here to one rail of the peer.
//
//   kActive --fail--> kFencing --fenced--> kQuarantined --begin_probe--> kProbing --succeed-->
//   kActive kProbing --fail--> kFencing; kQuarantined --probe_failed--> kQuarantined
//
// kFencing --absolved--> kActive.
//
// kFencing: the sink was asked to see to it that nothing of the path can land any more; what it
// held stays with it until the sink has answered. kProbing: one small piece at a time.
enum class PathState : std::uint8_t { kActive, kFencing, kQuarantined, kProbing };
inline constexpr std::array<std::string_view, 4> kPathStateNames = {"active", "fencing",
                                                                    "quarantined", "probing"};

// The worse of two states of a rail: of paths, or "idle" without any.
[[nodiscard]] constexpr std::string_view worse_state(std::string_view a, std::string_view b) {
    constexpr std::array<std::string_view, 5> kFromGoodToBad = {"idle", "active", "probing",
                                                                "quarantined", "fencing"};
    return std::ranges::find(kFromGoodToBad, a) < std::ranges::find(kFromGoodToBad, b) ? b : a;
}

// Pure: time is an argument. Not thread-safe.
class PathHealth {
  public:
    using Time = std::chrono::steady_clock::time_point;
    static constexpr std::chrono::seconds kFirstQuarantine{1};
    static constexpr std::chrono::seconds kLongestQuarantine{60};

    [[nodiscard]] PathState state() const noexcept { return state_; }
    // May take pieces.
    [[nodiscard]] bool is_usable() const noexcept {
        return state_ == PathState::kActive || state_ == PathState::kProbing;
    }
    // Counts how often the path was built.
    [[nodiscard]] std::uint32_t attempt() const noexcept { return attempt_; }
    // When kQuarantined: the end of it.
    [[nodiscard]] Time probe_time() const noexcept { return probe_time_; }

    // An error on the path. False when it is known already: nothing is to be done.
    bool fail(Time now) noexcept {
        if (!is_usable()) {
            return false;
        }
        // One that held for long is punished as if for the first time.
        if (state_ == PathState::kActive && now - active_since_ > kLongestQuarantine) {
            quarantine_ = kFirstQuarantine;
        }
        state_ = PathState::kFencing;
        return true;
    }
    // Nothing of the path can land any more.
    void fenced(Time now) noexcept {
        if (state_ == PathState::kFencing) {
            begin_quarantine(now);
        }
    }
    // It was ended for the sake of another path: it is built anew at once.
    void absolved() noexcept {
        if (state_ == PathState::kFencing) {
            state_ = PathState::kActive;
        }
    }
    // The path is built anew; returns the number of this attempt.
    std::uint32_t begin_probe() noexcept { return ++attempt_; }
    // It could not be built.
    void probe_failed(Time now) noexcept {
        if (state_ == PathState::kQuarantined) {
            begin_quarantine(now);
        }
    }
    // It was built, and may take a piece.
    void probing() noexcept {
        if (state_ == PathState::kQuarantined) {
            state_ = PathState::kProbing;
        }
    }
    // A piece came through.
    void succeeded(Time now) noexcept {
        if (state_ == PathState::kProbing) {
            state_ = PathState::kActive;
            active_since_ = now;
        }
    }

  private:
    void begin_quarantine(Time now) noexcept {
        state_ = PathState::kQuarantined;
        probe_time_ = now + quarantine_;
        quarantine_ = std::min<std::chrono::seconds>(quarantine_ * 2, kLongestQuarantine);
    }

    PathState state_ = PathState::kActive;
    std::chrono::seconds quarantine_ = kFirstQuarantine;
    std::uint32_t attempt_ = 0;
    Time probe_time_{};
    Time active_since_{};
};

// One rail of an engine, for people and reports.
struct RailInfo {
    std::string name;     // "tcp0"
    std::string address;  // "10.0.0.5", or what the fabric has instead
    std::string state;    // the worst of its paths: one of kPathStateNames, "idle" without any
    std::uint64_t bytes_out = 0;    // payload, re-sent bytes included
    std::uint64_t bytes_in = 0;     // payload placed here
    std::uint64_t outstanding = 0;  // bytes on their way out
};

}  // namespace weightsync
