// A wire inside one process, with virtual time and faults that a seed decides. It is the reference
// for what the contract allows a fabric to do, at its worst.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <weightsync/engine.hpp>

namespace weightsync {

// Chances are per write, 0 .. 1; times are virtual seconds.
struct SimFaults {
    bool reorder = false;  // delivered in any order
    double delay_s = 0;    // each write takes up to this much longer
    double duplicate = 0;  // lands a second time, with the bytes of the first
    double drop = 0;       // never lands; its operation fails with a rail error
    double late = 0;       // its operation fails first, and then it lands all the same
    double late_s = 1;     // how much later; second landings of duplicates too
    double invisible = 0;  // counted before its bytes are there; flush() brings them
    // Writes take turns on this many rails; order is kept on each, if at all.
    int rails = 1;
    // Lands, but is not acknowledged: sent again on the next rail, up to late_s later. Its
    // operation is done when the last copy has landed.
    double resend = 0;
};

class SimWire : Counted<Kind::kWire> {
  public:
    virtual ~SimWire() = default;

    // With `is_blocking`, a wait that finds nothing in flight blocks in real time until another
    // thread posts. Without, it moves virtual time to its deadline and gives up: fully
    // deterministic for one thread.
    [[nodiscard]] static std::shared_ptr<SimWire> make(std::uint64_t seed, bool is_blocking);

    // Engines of one wire have distinct names.
    [[nodiscard]] virtual std::unique_ptr<Fabric> attach(EngineContext& context) = 0;

    // For the writes that an engine posts from now on; empty name: all engines without their own.
    virtual void set_faults(const std::string& engine, const SimFaults& faults) = 0;
    // A frozen engine's writes are held; they land after thaw(), whatever happened meanwhile. One
    // rail of it, or all for kAllRails; thaw() is for all.
    static constexpr int kAllRails = -1;
    virtual void freeze(const std::string& engine, int rail) = 0;
    virtual void thaw(const std::string& engine) = 0;
    // A killed engine's writes vanish, and writes to it fail with a peer error.
    virtual void kill(const std::string& engine) = 0;

    // Delivers the next event; false when nothing can move.
    virtual bool step() = 0;
    // Delivers everything due up to a moment, and moves the time there.
    virtual void run_until(double time_s) = 0;
    // Delivers until nothing can move.
    virtual void run() = 0;
    [[nodiscard]] virtual double now_s() const = 0;
    // Events on their way; without held writes.
    [[nodiscard]] virtual std::size_t num_pending() const = 0;
    // How often each fault really happened.
    [[nodiscard]] virtual std::vector<std::pair<std::string, std::uint64_t>> counts() const = 0;
};

}  // namespace weightsync
