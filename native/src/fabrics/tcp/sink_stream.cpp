#include "sink_stream.hpp"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace weightsync::tcp {

namespace {

// Of one turn: other streams and a fence wait that long at most, a few milliseconds.
constexpr std::uint64_t kTurnBytes = std::uint64_t{8} << 20;
// Answered at once when so much has been placed: the source's window must not run dry.
constexpr std::uint64_t kAckBytes = std::uint64_t{512} << 10;

}  // namespace

SinkStream::State SinkStream::advance() {
    if (num_vectors_ == 0) {
        read_into(&head_, sizeof(head_));
    }
    std::uint64_t turn_bytes = 0;
    while (turn_bytes < kTurnBytes) {
        const std::span<iovec> vectors = wanted();
        const ssize_t got =
            ::readv(socket_.get(), vectors.data(), static_cast<int>(vectors.size()));
        if (got == 0) {
            return State::kOver;
        }
        if (got < 0) {
            if (errno == EINTR) {
                continue;
            }
            if (errno != EAGAIN || !send_ack()) {
                return State::kOver;
            }
            return State::kDrained;
        }
        turn_bytes += static_cast<std::uint64_t>(got);
        if (!consume(static_cast<std::size_t>(got))) {
            Tally tally;
            tally.unknown = 1;
            board_.account(tally);
            return State::kOver;
        }
        if (unacked_bytes_ >= kAckBytes && !send_ack()) {
            return State::kOver;
        }
    }
    return send_ack() ? State::kMore : State::kOver;
}

std::span<iovec> SinkStream::wanted() noexcept {
    return std::span(vectors_).subspan(first_vector_, num_vectors_ - first_vector_);
}

void SinkStream::read_into(void* to, std::size_t nbytes) noexcept {
    first_vector_ = 0;
    num_vectors_ = 1;
    vectors_[0] = {to, nbytes};
}

bool SinkStream::consume(std::size_t nbytes) {
    while (first_vector_ < num_vectors_ && nbytes >= vectors_[first_vector_].iov_len) {
        nbytes -= vectors_[first_vector_].iov_len;
        ++first_vector_;
    }
    if (first_vector_ < num_vectors_) {
        iovec& partial = vectors_[first_vector_];
        partial.iov_base = static_cast<std::byte*>(partial.iov_base) + nbytes;
        partial.iov_len -= nbytes;
    }
    for (;;) {
        const std::size_t num_left = num_vectors_ - first_vector_;
        if (phase_ == Phase::kPayload && num_left <= 1) {
            // Only the next head is missing, or a part of it.
            finish_block();
            phase_ = Phase::kHead;
        } else if (phase_ == Phase::kHead && num_left == 0) {
            if (!begin_block()) {
                return false;
            }
        } else if (phase_ == Phase::kTable && num_left == 0) {
            if (!begin_payload()) {
                return false;
            }
        } else {
            return true;
        }
    }
}

bool SinkStream::begin_block() {
    const BlockHeader& header = head_.header;
    if (header.magic != kBlockMagic || header.num_writes == 0 ||
        header.num_writes > kMaxBlockWrites || header.number != next_number_ || header.flags != 0 ||
        header.reserved != 0) {
        return false;
    }
    num_writes_ = header.num_writes;
    writes_[0] = head_.first;
    phase_ = Phase::kTable;
    read_into(&writes_[1], (num_writes_ - 1) * sizeof(BlockWrite));
    if (num_writes_ == 1) {
        first_vector_ = num_vectors_;
    }
    return true;
}

// Everything is checked before the first byte is placed.
bool SinkStream::begin_payload() {
    phase_ = Phase::kPayload;
    first_vector_ = 0;
    num_vectors_ = 0;
    payload_bytes_ = 0;
    for (const BlockWrite& write : std::span(writes_).first(num_writes_)) {
        const Range* range = ranges_.find(write.offset, write.nbytes, range_hint_);
        if (range == nullptr || write.immediate < kNoImmediate || write.reserved != 0) {
            return false;
        }
        if (write.nbytes == 0) {
            continue;
        }
        payload_bytes_ += write.nbytes;
        auto* to = reinterpret_cast<std::byte*>(range->base + (write.offset - range->arena_offset));
        if (num_vectors_ != 0) {
            iovec& last = vectors_[num_vectors_ - 1];
            if (static_cast<std::byte*>(last.iov_base) + last.iov_len == to) {
                last.iov_len += write.nbytes;
                continue;
            }
        }
        vectors_[num_vectors_++] = {to, write.nbytes};
    }
    vectors_[num_vectors_++] = {&head_, sizeof(head_)};
    return true;
}

void SinkStream::finish_block() {
    Tally tally;
    for (const BlockWrite& write : std::span(writes_).first(num_writes_)) {
        if (write.immediate >= 0) {
            tally.add(board_.mark(static_cast<std::uint32_t>(write.immediate)));
        }
    }
    tally.bytes = payload_bytes_;
    board_.account(tally);
    rail_.bytes_in.fetch_add(payload_bytes_, std::memory_order_relaxed);
    unacked_bytes_ += payload_bytes_;
    ++next_number_;
}

// One answer for all blocks since the last; what the socket does not take goes when it can.
bool SinkStream::send_ack() noexcept {
    for (;;) {
        if (ack_left_ == 0) {
            if (num_acked_ == next_number_) {
                return true;
            }
            ack_.number = next_number_ - 1;
            num_acked_ = next_number_;
            unacked_bytes_ = 0;
            ack_left_ = sizeof(ack_);
        }
        const auto* bytes = reinterpret_cast<const std::byte*>(&ack_);
        const ssize_t sent = ::send(socket_.get(), bytes + sizeof(ack_) - ack_left_, ack_left_,
                                    MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent >= 0) {
            ack_left_ -= static_cast<std::size_t>(sent);
        } else if (errno == EAGAIN) {
            return true;
        } else if (errno != EINTR) {
            return false;
        }
    }
}

}  // namespace weightsync::tcp
