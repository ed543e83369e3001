// Peer groups: barriers and small messages between members that know each other by number. Built
// on one-sided writes and arrival slots alone, so they work over every fabric.
//
// Every member exports one small target of its own and connects to those of the others; who hands
// round the descriptors is not our business. What makes using slots again exact is promise F1 of
// docs/protocol.md: after a write's local completion no copy of it lands.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <weightsync/engine.hpp>

namespace weightsync {

inline constexpr std::uint32_t kMaxMembers = 4096;
inline constexpr std::uint32_t kMaxMessageBytes = 64U << 10;
inline constexpr std::uint32_t kMaxWindow = 1024;
// Barrier rounds with slots of their own. Three are enough: a member that sees round r + 1 of
// another knows that its writes of round r are complete, so two rounds later their slot can be
// emptied, before anybody can have come to the round that uses it again.
inline constexpr std::uint32_t kBarrierRounds = 16;

// Members of one group have equal options, but for the index.
struct GroupOptions {
    std::uint32_t index = 0;
    std::uint32_t size = 0;
    std::uint64_t generation = 0;
    std::uint32_t message_bytes = 4096;  // longest message
    std::uint32_t window = 8;            // messages of one sender that wait for one receiver
};

struct Message {
    std::uint32_t member = 0;
    std::vector<std::byte> bytes;
};

// Taken by one thread at a time, for longer than a mutex may be held: others wait with a deadline.
class Turn {
  public:
    [[nodiscard]] bool is_taken() const noexcept { return is_taken_.load(); }
    [[nodiscard]] bool try_take() noexcept { return !is_taken_.exchange(true); }
    // False when the deadline passed.
    [[nodiscard]] bool take(Fabric& fabric, const Deadline& deadline);
    void give() noexcept {
        is_taken_.store(false);
        wake(word_);
    }

  private:
    std::atomic<bool> is_taken_{false};
    WakeWord word_;
};

class BarrierRound;

class PeerGroup : public std::enable_shared_from_this<PeerGroup>, Counted<Kind::kGroup> {
  public:
    // Use Engine::open_group().
    PeerGroup(Engine& engine, EngineContext& context, const GroupOptions& options);
    ~PeerGroup();

    [[nodiscard]] const GroupOptions& options() const noexcept { return options_; }
    [[nodiscard]] std::vector<std::byte> descriptor() const;
    // Once for each other member, before anything is said to it; its own index is ignored.
    void connect(std::int64_t member, std::span<const std::byte> descriptor,
                 const Deadline& deadline);
    [[nodiscard]] bool is_connected(std::int64_t member) const;

    // Tells all others that this member has come; or returns the round before, as long as nobody
    // here has seen that it is over. So a wait that was given up is taken up again by the next one.
    [[nodiscard]] std::shared_ptr<BarrierRound> start_barrier();
    void barrier(const Deadline& deadline);

    // Copies a message and posts it. The operation is done when the message lies in the receiver's
    // mailbox; whether it was taken out is not known. Waits while the window is full.
    [[nodiscard]] std::shared_ptr<Operation> send(std::int64_t member,
                                                  std::span<const std::byte> bytes,
                                                  const Deadline& deadline);
    // Null when it would have to wait.
    [[nodiscard]] std::shared_ptr<Operation> try_send(std::int64_t member,
                                                      std::span<const std::byte> bytes);
    // Takes the oldest message of a member, or of any for kAnyMember, in turns.
    static constexpr std::int64_t kAnyMember = -1;
    [[nodiscard]] Message receive(std::int64_t member, const Deadline& deadline);
    [[nodiscard]] std::optional<Message> try_receive(std::int64_t member);
    // Whether the try_ call would find something to do or an error, as far as one can tell.
    [[nodiscard]] bool can_send(std::int64_t member);
    [[nodiscard]] bool can_receive(std::int64_t member) const;

    void close() noexcept;
    [[nodiscard]] bool is_open() const noexcept { return target_->is_open(); }

  private:
    friend class BarrierRound;

    // Everything about one other member.
    struct Lane {
        std::uint32_t member = 0;
        std::shared_ptr<Remote> remote;  // set once, before is_connected
        std::atomic<bool> is_connected{false};
        std::atomic<bool> is_connecting{false};
        Turn sending;
        std::atomic<std::uint64_t> num_sent{0};
        std::vector<std::shared_ptr<Operation>> sent;  // newest at each position; by `sending`
        Turn receiving;
        std::atomic<std::uint64_t> num_received{0};
        std::uint64_t num_credited = 0;                   // by `receiving`, as all below
        std::vector<std::shared_ptr<Operation>> credits;  // newest at each position
    };

    // Where things are at a member; `lane` as that member numbers the others.
    [[nodiscard]] static std::uint32_t lane_of(std::uint32_t member, std::uint32_t other) noexcept {
        return other < member ? other : other - 1;
    }
    [[nodiscard]] std::uint32_t num_lanes() const noexcept { return options_.size - 1; }
    [[nodiscard]] std::int32_t message_slot(std::uint32_t lane, std::uint64_t number) const;
    [[nodiscard]] std::int32_t credit_slot(std::uint32_t lane, std::uint64_t number) const;
    [[nodiscard]] std::uint64_t message_offset(std::uint32_t lane, std::uint64_t number) const;
    [[nodiscard]] std::uint64_t stride() const noexcept;

    [[nodiscard]] Lane& lane_to(std::int64_t member) const;
    [[nodiscard]] Lane& connected_lane(std::int64_t member) const;
    [[nodiscard]] std::string name_of(const Lane& lane) const;
    void check_message(std::span<const std::byte> bytes) const;
    // Writes nothing but an immediate.
    [[nodiscard]] std::shared_ptr<Operation> tell(const Lane& lane, std::int32_t slot,
                                                  std::uint32_t chunk) const;

    // With the lane's turn taken.
    void check_sent(const Lane& lane) const;
    [[nodiscard]] bool has_credit(const Lane& lane) const;
    [[nodiscard]] std::shared_ptr<Operation> post_message(Lane& lane,
                                                          std::span<const std::byte> bytes);
    [[nodiscard]] bool has_message(const Lane& lane) const;
    [[nodiscard]] std::optional<Message> take_message(Lane& lane, const Deadline* deadline);
    void pay_credits(Lane& lane);
    template <class Use>
    [[nodiscard]] std::optional<Message> first_message(std::int64_t member, const Use& use);

    EngineContext& context_;
    Engine& engine_;  // kept by target_
    GroupOptions options_;
    int chunk_bits_;
    std::shared_ptr<Memory> arena_;    // what others write
    std::shared_ptr<Memory> staging_;  // what we send from
    std::shared_ptr<Target> target_;
    std::vector<std::unique_ptr<Lane>> lanes_;
    std::atomic<std::uint32_t> next_lane_{0};  // whose turn it is to be heard

    std::mutex round_mutex_;
    std::shared_ptr<BarrierRound> round_;
};

// One barrier of one member. Over when all others have come and all of them were told.
class BarrierRound {
  public:
    // Use PeerGroup::start_barrier(): what it gives out also keeps the group.
    BarrierRound(PeerGroup& group, std::uint64_t number) : group_(group), number_(number) {}

    [[nodiscard]] std::uint64_t number() const noexcept { return number_; }
    [[nodiscard]] std::size_t num_writes() const noexcept { return told_.size(); }
    // The three that tell, and by that see, whether it is over.
    [[nodiscard]] bool is_done();
    [[nodiscard]] std::optional<Error> error();
    // Throws the error, or kTimeout naming who has not come; the round goes on then.
    void wait(const Deadline& deadline);

  private:
    friend class PeerGroup;
    enum class State : std::uint8_t { kPending, kOver, kFailed };
    void tell_all();
    [[nodiscard]] std::int32_t slot() const noexcept;
    // Looks, and cleans up after a round that is over. Not inside a wait: it takes locks.
    State settle();
    State see();
    [[nodiscard]] bool is_over_and_seen();
    [[noreturn]] void throw_timeout(const Deadline& deadline) const;

    PeerGroup& group_;
    const std::uint64_t number_;
    // One for each lane, null where posting failed; never changed once the round is given out.
    std::vector<std::shared_ptr<Operation>> told_;
    std::mutex mutex_;
    State state_ = State::kPending;
    bool is_seen_ = false;  // to be over
    std::optional<Error> error_;
};

}  // namespace weightsync
