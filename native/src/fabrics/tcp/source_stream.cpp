#include "source_stream.hpp"

#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

namespace weightsync::tcp {

std::uint64_t SourceStream::num_moved() const noexcept {
    int num_queued = 0;
    ::ioctl(socket_.get(), SIOCOUTQ, &num_queued);
    return num_sent_ - static_cast<std::uint64_t>(num_queued);
}

void SourceStream::begin(std::span<const Piece> pieces) noexcept {
    Block& block = blocks_[(first_block_ + num_blocks_) % kMaxBlocks];
    ++num_blocks_;
    block.num_ids = pieces.size();
    block.nbytes = 0;
    header_.num_writes = static_cast<std::uint16_t>(pieces.size());
    header_.number = next_number_++;
    vectors_[0] = {&header_, sizeof(header_)};
    vectors_[1] = {writes_.data(), pieces.size() * sizeof(BlockWrite)};
    first_vector_ = 0;
    num_vectors_ = 2;
    for (std::size_t i = 0; i < pieces.size(); ++i) {
        const Piece& piece = pieces[i];
        block.ids[i] = piece.id;
        block.nbytes += piece.nbytes;
        writes_[i] = {piece.destination, piece.nbytes, static_cast<std::int32_t>(piece.immediate),
                      0};
        if (piece.nbytes == 0) {
            continue;
        }
        auto* from = reinterpret_cast<std::byte*>(piece.source);
        iovec& last = vectors_[num_vectors_ - 1];
        if (num_vectors_ > 2 && static_cast<std::byte*>(last.iov_base) + last.iov_len == from) {
            last.iov_len += piece.nbytes;
        } else {
            vectors_[num_vectors_++] = {from, piece.nbytes};
        }
    }
    outstanding_ += block.nbytes;
    rail_.bytes_out.fetch_add(block.nbytes, std::memory_order_relaxed);
}

bool SourceStream::send() noexcept {
    while (first_vector_ != num_vectors_) {
        msghdr message{};
        message.msg_iov = vectors_.data() + first_vector_;
        message.msg_iovlen = num_vectors_ - first_vector_;
        const ssize_t sent = ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            if (errno == EAGAIN) {
                is_blocked_ = true;
                return true;
            }
            if (errno == EINTR) {
                continue;
            }
            return false;
        }
        auto left = static_cast<std::size_t>(sent);
        num_sent_ += left;
        while (first_vector_ != num_vectors_ && left >= vectors_[first_vector_].iov_len) {
            left -= vectors_[first_vector_++].iov_len;
        }
        if (left != 0) {
            iovec& partial = vectors_[first_vector_];
            partial.iov_base = static_cast<std::byte*>(partial.iov_base) + left;
            partial.iov_len -= left;
        }
    }
    return true;
}

bool SourceStream::receive_acks() {
    acked_.clear();
    for (;;) {
        const ssize_t got = ::recv(socket_.get(), ack_buffer_.data() + ack_bytes_,
                                   ack_buffer_.size() - ack_bytes_, MSG_DONTWAIT);
        if (got <= 0) {
            if (got < 0 && errno == EINTR) {
                continue;
            }
            return got < 0 && errno == EAGAIN;
        }
        ack_bytes_ += static_cast<std::size_t>(got);
        std::size_t at = 0;
        for (; ack_bytes_ - at >= sizeof(Ack); at += sizeof(Ack)) {
            Ack ack;
            std::memcpy(&ack, ack_buffer_.data() + at, sizeof(ack));
            if (!take_ack(ack)) {
                return false;
            }
        }
        std::memmove(ack_buffer_.data(), ack_buffer_.data() + at, ack_bytes_ - at);
        ack_bytes_ -= at;
    }
}

bool SourceStream::take_ack(const Ack& ack) {
    // Blocks are numbered in the order of the ring; one that is still being sent cannot be meant.
    const std::size_t num_sent = num_blocks_ - (first_vector_ == num_vectors_ ? 0 : 1);
    const std::uint32_t oldest = next_number_ - static_cast<std::uint32_t>(num_blocks_);
    const std::uint32_t count = ack.number - oldest + 1;
    if (ack.magic != kAckMagic || count == 0 || count > num_sent) {
        return false;
    }
    for (std::uint32_t i = 0; i < count; ++i) {
        const Block& block = blocks_[first_block_];
        acked_.insert(acked_.end(), block.ids.begin(),
                      block.ids.begin() + static_cast<std::ptrdiff_t>(block.num_ids));
        outstanding_ -= block.nbytes;
        first_block_ = (first_block_ + 1) % kMaxBlocks;
        --num_blocks_;
    }
    return true;
}

}  // namespace weightsync::tcp
