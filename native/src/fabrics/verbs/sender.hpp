// The source's end of one path: takes pieces off the queue and posts them as chains of writes.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <weightsync/local_memory.hpp>
#include <weightsync/send_queue.hpp>

#include "rail.hpp"
#include "wire.hpp"

namespace weightsync::verbs {

// What the senders of one remote share. Outlives them.
struct Outbox {
    std::unique_ptr<SendQueue> queue;
    RangeTable ranges;                 // base: address at the sink
    std::vector<std::uint32_t> rkeys;  // [range * num_sink_rails + sink rail]
    std::size_t num_sink_rails = 0;
    std::shared_ptr<const LocalMemory> memory;
    // By path: there may be work for it.
    std::unique_ptr<std::atomic<bool>[]> has_work;
};

// Everything but the constructor is for the rail's thread.
class Sender final : public Link, Counted<Kind::kSession> {
  public:
    // Told once, on the rail's thread, when the path has failed and its memory is quiescent.
    using OnFailure = std::function<void(const Error&)>;
    // Told once, when a piece came through while probing.
    using OnSuccess = std::function<void()>;

    // `rail_index`: which of this engine's rails it is, for keys of local memory.
    Sender(Rail& rail, std::size_t rail_index, std::shared_ptr<Outbox> outbox, PathName name,
           std::string label, OnFailure on_failure, OnSuccess on_success);
    ~Sender() override;

    // Makes the queue pair; `self` is this. Returns what the sink must know.
    [[nodiscard]] PathEnd open(const std::shared_ptr<Sender>& self);
    // The sink is ready. `is_probe`: one piece at a time, until one came through.
    void start(const PathEnd& sink, bool is_probe);
    // Takes no more pieces, as on a failure, but tells nobody. Quiescent on return.
    void close() noexcept;
    [[nodiscard]] bool is_open() const noexcept { return queue_pair_ != nullptr; }

    void on_completion(const ibv_wc& completion, std::uint32_t number) override;
    bool advance() override;
    void on_port(bool is_up) override;

  private:
    static constexpr std::uint32_t kDepth = 256;  // of the send queue; a power of two
    static constexpr std::uint32_t kChain = 32;   // requests per doorbell
    // The sink announces quarters of its receive queue, and never more of them than are here.
    static constexpr std::uint32_t kCreditReceives = 8;
    static constexpr std::uint32_t kReceiveFlag = 1U << 31;  // of a request's number
    static constexpr std::uint64_t kWindowBytes = std::uint64_t{8} << 20;

    struct Sent {
        std::uint64_t id = 0;
        std::uint64_t nbytes = 0;
    };

    [[nodiscard]] std::uint32_t outstanding() const noexcept { return posted_ - done_; }
    void prepare_templates();
    void post_receives(std::uint32_t count);
    bool settle();
    [[nodiscard]] std::uint32_t room() const noexcept;
    bool send_more();
    void watch_for_stall();
    // Fills request `i` of the chain. False when its memory is not registered.
    [[nodiscard]] bool fill(std::uint32_t i, const Piece& piece);
    std::uint32_t post_chain(std::uint32_t count);
    void note_refusal(int error, bool has_progress);
    bool retry_stash(std::uint32_t free);
    void break_with(Error error);
    [[nodiscard]] Error completion_error(const ibv_wc& completion) const;

    Rail& rail_;
    std::shared_ptr<Outbox> outbox_;
    const PathName name_;
    const std::string label_;  // "rxe0:1 to PEER"
    OnFailure on_failure_;
    OnSuccess on_success_;
    MemoryView memory_;

    std::unique_ptr<QueuePair> queue_pair_;
    Tag tag_;
    std::uint32_t depth_ = kDepth;
    bool is_started_ = false;
    bool is_probing_ = false;
    std::optional<Error> error_;  // why it is broken, until it is told

    // Requests: numbers since the beginning, modulo 2^31.
    std::uint32_t posted_ = 0;
    std::uint32_t done_ = 0;
    std::uint64_t outstanding_bytes_ = 0;
    std::chrono::steady_clock::time_point moved_at_{};  // when something completed last
    std::array<Sent, kDepth> sent_{};
    std::vector<std::uint64_t> completed_;  // ids to be told to the queue
    // Immediates: how many the sink could take since the beginning, and how many went; modulo 2^32.
    std::uint32_t granted_ = 0;
    std::uint32_t spent_ = 0;
    std::uint32_t receives_free_ = 0;  // to be posted again

    // Taken off the queue, not yet taken by the device.
    std::vector<Piece> stash_;
    std::optional<std::chrono::steady_clock::time_point> refused_since_;
    std::chrono::steady_clock::time_point retry_at_{};

    std::size_t range_hint_ = 0;
    std::array<Piece, kChain> pieces_{};
    std::array<ibv_send_wr, kChain> requests_{};
    std::array<ibv_sge, kChain> parts_{};
    std::array<ibv_recv_wr, kCreditReceives> receives_{};
};

}  // namespace weightsync::verbs
