// The wire and what hangs on it. One mutex guards all of it: order is the point here, not speed.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <queue>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include <weightsync/sim.hpp>

namespace weightsync::sim {

using Nanoseconds = std::uint64_t;

inline constexpr double kNsPerSecond = 1e9;

enum class Tick : std::uint8_t {
    kDelivered,
    kReordered,
    kDelayed,
    kDuplicated,
    kDropped,
    kLate,
    kLateLanded,
    kHeld,
    kInvisible,
    kFlushed,
    kFenced,
    kKilled,
    kResent,
};
inline constexpr std::array<const char*, 13> kTickNames = {
    "delivered", "reordered", "delayed", "duplicated", "dropped", "late",   "late_landed",
    "held",      "invisible", "flushed", "fenced",     "killed",  "resent",
};

class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed) {}
    std::uint64_t next() noexcept {  // splitmix64
        state_ += 0x9e3779b97f4a7c15ULL;
        std::uint64_t z = state_;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
        return z ^ (z >> 31);
    }
    double uniform() noexcept {
        constexpr double kScale = 1.0 / 9007199254740992.0;  // 2^-53
        return static_cast<double>(next() >> 11) * kScale;
    }
    bool happens(double chance) noexcept { return chance > 0 && uniform() < chance; }

  private:
    std::uint64_t state_;
};

class Wire;

class SimTarget final : public TargetPort {
  public:
    SimTarget(Wire& wire, EngineContext& context, std::uint64_t id, TargetSpec spec)
        : wire_(wire),
          engine_(context.name),
          id_(id),
          spec_(std::move(spec)),
          board_(spec_.make_board(context.progress.event.get())) {}

    [[nodiscard]] Board& board() noexcept override { return board_; }
    [[nodiscard]] std::vector<std::byte> descriptor() const override;
    void fence(bool discard) override;
    void flush() override;
    void close() noexcept override;
    [[nodiscard]] const std::string& engine() const noexcept { return engine_; }
    [[nodiscard]] const TargetSpec& spec() const noexcept { return spec_; }

  private:
    friend class Wire;
    struct Invisible {
        std::uint64_t address;
        std::vector<std::byte> bytes;
    };
    Wire& wire_;  // outlives it: events of the wire hold targets
    std::string engine_;
    std::uint64_t id_;
    TargetSpec spec_;
    Board board_;
    bool is_open_ = true;               // by the wire's mutex, as all below
    std::vector<Invisible> invisible_;  // counted, not yet there
};

// A posted batch on its way.
struct Transfer {
    std::shared_ptr<Operation> operation;
    std::shared_ptr<SimTarget> target;
    std::string engine;  // of the source
    std::size_t num_left = 0;
    std::optional<Error> error;
    bool is_over = false;
};

enum class Fate : std::uint8_t { kLand, kDrop, kLate };

struct Event {
    Nanoseconds time = 0;
    std::uint64_t order = 0;  // breaks ties; the order of posting
    std::shared_ptr<Transfer> transfer;
    std::size_t row = 0;
    int rail = 0;
    Fate fate = Fate::kLand;
    bool is_resent = false;  // once more, on the next rail
    bool is_duplicated = false;
    bool is_invisible = false;
    // A second or late landing carries its bytes: the sources may be something else by now.
    bool is_echo = false;
    bool is_late = false;
    std::vector<std::byte> bytes;
};
using EventPtr = std::shared_ptr<Event>;

struct Later {
    bool operator()(const EventPtr& a, const EventPtr& b) const noexcept {
        return a->time != b->time ? a->time > b->time : a->order > b->order;
    }
};

class Wire final : public SimWire, public std::enable_shared_from_this<Wire> {
  public:
    Wire(std::uint64_t seed, bool is_blocking)
        : id_(random_u64()), is_blocking_(is_blocking), random_(seed) {}

    [[nodiscard]] std::unique_ptr<Fabric> attach(EngineContext& context) override;
    void set_faults(const std::string& engine, const SimFaults& faults) override;
    void freeze(const std::string& engine, int rail) override;
    void thaw(const std::string& engine) override;
    void kill(const std::string& engine) override;
    bool step() override {
        const std::lock_guard lock(mutex_);
        return step_until(UINT64_MAX);
    }
    void run_until(double time_s) override;
    void run() override {
        while (step()) {
        }
    }
    [[nodiscard]] double now_s() const override {
        const std::lock_guard lock(mutex_);
        return static_cast<double>(now_) / kNsPerSecond;
    }
    [[nodiscard]] std::size_t num_pending() const override {
        const std::lock_guard lock(mutex_);
        return events_.size();
    }
    [[nodiscard]] std::vector<std::pair<std::string, std::uint64_t>> counts() const override;

    // For ports.
    [[nodiscard]] std::uint64_t id() const noexcept { return id_; }
    [[nodiscard]] std::shared_ptr<SimTarget> add_target(EngineContext& context, TargetSpec spec);
    [[nodiscard]] std::shared_ptr<SimTarget> find_target(std::uint64_t id);
    void detach(const std::string& engine) noexcept;
    void post(const std::shared_ptr<Transfer>& transfer);
    void cancel(const std::vector<std::shared_ptr<Transfer>>& transfers,
                const Error& error) noexcept;
    void close_target(SimTarget& target) noexcept;
    void flush(SimTarget& target);
    [[nodiscard]] bool wait(const std::function<bool()>& ready, const Deadline& deadline);

  private:
    void count(Tick tick, std::uint64_t amount = 1) noexcept {
        counts_[static_cast<std::size_t>(tick)] += amount;
    }
    [[nodiscard]] const SimFaults& faults_of(const std::string& engine) const;
    bool step_until(Nanoseconds end);
    void deliver(const EventPtr& event);
    void land(Event& event, std::span<const std::byte> bytes);
    void surface(SimTarget& target, std::uint64_t address, std::uint64_t nbytes);
    void resolve(Transfer& transfer, std::optional<Error> error) noexcept;
    [[nodiscard]] bool is_frozen(const Event& event) const;
    void resend(const Event& event);
    void echo(const Event& event, std::span<const std::byte> bytes, bool is_late);
    void push(EventPtr event) { events_.push(std::move(event)); }

    const std::uint64_t id_;
    const bool is_blocking_;
    mutable std::mutex mutex_;
    std::condition_variable changed_;
    Random random_;
    Nanoseconds now_ = 0;
    std::uint64_t next_order_ = 0;
    std::uint64_t next_target_ = 1;
    std::uint64_t newest_delivered_ = 0;
    std::priority_queue<EventPtr, std::vector<EventPtr>, Later> events_;
    // Of the newest write of each engine on each rail.
    std::map<std::pair<std::string, int>, Nanoseconds> last_time_;
    std::map<std::string, SimFaults> faults_;
    std::set<std::string> engines_;
    std::set<std::pair<std::string, int>> frozen_;
    std::set<std::string> killed_;
    std::map<std::string, std::vector<EventPtr>> held_;
    std::unordered_map<std::uint64_t, std::weak_ptr<SimTarget>> targets_;
    std::array<std::uint64_t, kTickNames.size()> counts_{};
};

}  // namespace weightsync::sim
