// The sink's end of one data connection: reads blocks straight into exported memory.
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstdint>

#include <weightsync/board.hpp>
#include <weightsync/ranges.hpp>

#include "rail.hpp"
#include "wire.hpp"

namespace weightsync::tcp {

// Of the rail's thread, but for construction.
class SinkStream : Counted<Kind::kSession> {
  public:
    // What `ranges` and `board` are of outlives the stream.
    SinkStream(UniqueFd socket, Rail& rail, const RangeTable& ranges, Board& board)
        : socket_(std::move(socket)), rail_(rail), ranges_(ranges), board_(board) {}

    enum class State : std::uint8_t {
        kDrained,  // nothing more for now
        kMore,     // call again soon
        kOver,     // the peer hung up, or what it said makes no sense
    };
    // Takes in what has arrived, a few megabytes at most, and answers it.
    [[nodiscard]] State advance();

    [[nodiscard]] Rail& rail() const noexcept { return rail_; }
    [[nodiscard]] int socket() const noexcept { return socket_.get(); }
    // Set and used by the target.
    std::uint64_t watch = 0;
    std::uint32_t path = 0;
    std::uint32_t attempt = 0;

  private:
    enum class Phase : std::uint8_t { kHead, kTable, kPayload };

    // What to read next.
    [[nodiscard]] std::span<iovec> wanted() noexcept;
    // Takes note of bytes that were read; false when they make no sense.
    [[nodiscard]] bool consume(std::size_t nbytes);
    [[nodiscard]] bool begin_block();
    [[nodiscard]] bool begin_payload();
    void finish_block();
    void read_into(void* to, std::size_t nbytes) noexcept;
    [[nodiscard]] bool send_ack() noexcept;

    UniqueFd socket_;
    Rail& rail_;
    const RangeTable& ranges_;
    Board& board_;
    std::size_t range_hint_ = 0;

    Phase phase_ = Phase::kHead;
    BlockHead head_;
    std::array<BlockWrite, kMaxBlockWrites> writes_;
    std::size_t num_writes_ = 0;  // head_ may hold the next block's already
    std::uint64_t payload_bytes_ = 0;
    // Payloads, and behind them the head of the next block.
    std::array<iovec, kMaxBlockWrites + 1> vectors_;
    std::size_t first_vector_ = 0;
    std::size_t num_vectors_ = 0;

    std::uint32_t next_number_ = 0;
    std::uint32_t num_acked_ = 0;
    std::uint64_t unacked_bytes_ = 0;
    Ack ack_;
    std::size_t ack_left_ = 0;  // bytes of ack_ that the socket did not take
};

}  // namespace weightsync::tcp
