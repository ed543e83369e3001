// What of pulling depends on where memory lies: on the host, or also on its GPUs.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <weightsync/fabric.hpp>
#include <weightsync/lease.hpp>

#include "wire.hpp"

namespace weightsync::local {

// A run of bytes to pull.
struct Span {
    std::uint64_t to = 0;    // in this process
    std::uint64_t from = 0;  // in the source's
    std::uint64_t nbytes = 0;
};

// How far a pull came.
struct Pulled {
    std::size_t num_spans = 0;  // whole ones, from the first on
    std::uint64_t nbytes = 0;   // of the span behind them
    int error = 0;              // why no further: an errno, or a CUresult with its sign changed
};

// What a sink must know of a source's leased memory to read it. Never changed.
struct Notes {
    std::uint64_t version = 0;  // from 1 on; other bytes have another one
    std::vector<std::byte> bytes;
};

// What a sink holds of one source to read its memory. Thread-safe.
class Imports {
  public:
    Imports() = default;
    virtual ~Imports() = default;
    Imports(const Imports&) = delete;
    Imports& operator=(const Imports&) = delete;
    // Waits for pulls that read from it; later ones fail.
    virtual void close() const noexcept = 0;
};

// The memory of one target. Thread-safe.
class SinkMemory {
  public:
    virtual ~SinkMemory() = default;
    // How much a thread pulls at a time, up to three times as much: large enough to hide the cost
    // of a call, small enough that a fence waits for a millisecond or two.
    [[nodiscard]] virtual std::uint64_t unit_bytes(const Imports* imports) const noexcept = 0;
    // Opens what notes name; `before` holds what the ones before named, or is null. Notes come from
    // the peer and may be anything.
    struct Opened {
        std::shared_ptr<const Imports> imports;
        int error = 0;  // as Pulled's
    };
    [[nodiscard]] virtual Opened open(const PeerId& peer, std::span<const std::byte> notes,
                                      const std::shared_ptr<const Imports>& before) = 0;
    // Returns when the bytes are there. `imports` may be null. At most kMaxSpans.
    static constexpr std::size_t kMaxSpans = 512;
    [[nodiscard]] virtual Pulled pull(const PeerId& peer, const Imports* imports,
                                      std::span<const Span> spans) noexcept = 0;
};

// How long a source waits for sinks to let go of memory that it may free next.
inline constexpr std::chrono::milliseconds kPatience{1000};

// A source's connection.
class Announcer {
  public:
    virtual ~Announcer() = default;
    // Tells the sink of new notes. Returns when it has let go of what they do not name, or when the
    // time is up: a frozen sink never does.
    virtual void announce(std::chrono::steady_clock::time_point end) noexcept = 0;
};

// One per fabric.
class PullMemory {
  public:
    virtual ~PullMemory() = default;
    // Whether sources may write shared memory themselves, where a target has nothing else.
    [[nodiscard]] virtual bool can_push() const noexcept = 0;
    // A source connects: from now on notes() tells of all that it leases. Throws kMemory.
    virtual void follow(LeaseTable& leases) = 0;
    virtual void unfollow(LeaseTable& leases) noexcept = 0;
    // Who tells sinks of new notes.
    virtual void add(std::weak_ptr<Announcer> announcer) = 0;
    // Null when there is nothing to say.
    [[nodiscard]] virtual std::shared_ptr<const Notes> notes() const = 0;
    // Throws kMemory.
    [[nodiscard]] virtual std::shared_ptr<SinkMemory> sink_memory(const TargetSpec& spec) = 0;
    // What an error of Pulled or Opened means, and what to do.
    [[nodiscard]] virtual std::string error_text(int error) const = 0;
};

[[nodiscard]] std::unique_ptr<PullMemory> make_host_memory();

// By process_vm_readv; both sides are memory of the host.
[[nodiscard]] Pulled pull_from_host(int pid, std::span<const Span> spans) noexcept;
[[nodiscard]] std::string host_error_text(int error);

}  // namespace weightsync::local
