// The source's end of one data connection: sends blocks straight from source memory.
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include <weightsync/send_queue.hpp>

#include "rail.hpp"
#include "wire.hpp"

namespace weightsync::tcp {

// Used under the lock of its path.
class SourceStream {
  public:
    SourceStream(UniqueFd socket, Rail& rail) : socket_(std::move(socket)), rail_(rail) {
        acked_.reserve(kMaxBlocks * kMaxBlockWrites);
    }

    [[nodiscard]] int socket() const noexcept { return socket_.get(); }
    // A new block can begin now.
    [[nodiscard]] bool has_room() const noexcept {
        return !is_blocked_ && num_blocks_ < kMaxBlocks && num_vectors_ == first_vector_;
    }
    // A block has begun and the socket takes more of it.
    [[nodiscard]] bool has_rest() const noexcept {
        return !is_blocked_ && num_vectors_ != first_vector_;
    }
    [[nodiscard]] std::uint64_t outstanding_bytes() const noexcept { return outstanding_; }
    // Bytes that the peer's system has taken so far: grows while anything moves.
    [[nodiscard]] std::uint64_t num_moved() const noexcept;
    void unblock() noexcept { is_blocked_ = false; }

    // Begins a block; at most kMaxBlockWrites pieces, at least one. Then send().
    void begin(std::span<const Piece> pieces) noexcept;
    // False when the connection is broken.
    [[nodiscard]] bool send() noexcept;
    // Reads answers. False when the peer hung up or answers what was not sent; what it answered
    // before that counts all the same.
    [[nodiscard]] bool receive_acks();
    // Ids of the pieces that the last receive_acks() found answered.
    [[nodiscard]] std::span<const std::uint64_t> acked() const noexcept { return acked_; }

    std::uint64_t watch = 0;

  private:
    static constexpr std::size_t kMaxBlocks = 64;
    struct Block {
        std::uint64_t nbytes = 0;
        std::size_t num_ids = 0;
        std::array<std::uint64_t, kMaxBlockWrites> ids;
    };
    [[nodiscard]] bool take_ack(const Ack& ack);

    UniqueFd socket_;
    Rail& rail_;
    bool is_blocked_ = false;
    // The block that is being sent.
    BlockHeader header_;
    std::array<BlockWrite, kMaxBlockWrites> writes_;
    std::array<iovec, kMaxBlockWrites + 2> vectors_;
    std::size_t first_vector_ = 0;
    std::size_t num_vectors_ = 0;
    // Blocks that were not answered, the oldest first: a ring.
    std::array<Block, kMaxBlocks> blocks_;
    std::size_t first_block_ = 0;
    std::size_t num_blocks_ = 0;
    std::uint32_t next_number_ = 0;
    std::uint64_t outstanding_ = 0;
    std::uint64_t num_sent_ = 0;
    std::vector<std::uint64_t> acked_;
    std::array<std::byte, 64 * sizeof(Ack)> ack_buffer_;
    std::size_t ack_bytes_ = 0;
};

}  // namespace weightsync::tcp
