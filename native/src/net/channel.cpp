#include "channel.hpp"

#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <cstring>

#include <weightsync/error.hpp>

namespace weightsync::net {

namespace {

constexpr std::size_t kMaxUnsent = std::size_t{1} << 20;

}  // namespace

bool Channel::send(std::uint8_t type, std::span<const std::byte> payload) {
    if (payload.size() > kMaxFrameBytes) {
        throw Error(Scope::kInternal, "control message of " + std::to_string(payload.size()) +
                                          " bytes is longer than a frame");
    }
    const std::lock_guard lock(mutex_);
    if (is_broken_ || unsent_.size() > kMaxUnsent) {
        return false;
    }
    const auto length = static_cast<std::uint32_t>(payload.size() + 1);
    std::array<std::byte, sizeof(length) + 1> head{};
    std::memcpy(head.data(), &length, sizeof(length));
    head.back() = static_cast<std::byte>(type);
    unsent_.insert(unsent_.end(), head.begin(), head.end());
    unsent_.insert(unsent_.end(), payload.begin(), payload.end());
    return flush_locked();
}

bool Channel::flush() {
    const std::lock_guard lock(mutex_);
    return flush_locked();
}

bool Channel::is_idle() {
    const std::lock_guard lock(mutex_);
    return unsent_.empty();
}

bool Channel::flush_locked() {
    std::size_t done = 0;
    while (!is_broken_ && done < unsent_.size()) {
        const ssize_t sent = ::send(socket_.get(), unsent_.data() + done, unsent_.size() - done,
                                    MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent >= 0) {
            done += static_cast<std::size_t>(sent);
        } else if (errno == EAGAIN) {
            break;
        } else if (errno != EINTR) {
            is_broken_ = true;
        }
    }
    unsent_.erase(unsent_.begin(), unsent_.begin() + static_cast<std::ptrdiff_t>(done));
    return !is_broken_;
}

bool Channel::fill(bool& is_empty) {
    received_.erase(received_.begin(), received_.begin() + static_cast<std::ptrdiff_t>(begin_));
    begin_ = 0;
    std::array<std::byte, 8192> buffer;
    const ssize_t got = ::recv(socket_.get(), buffer.data(), buffer.size(), MSG_DONTWAIT);
    is_empty = got < 0 && errno == EAGAIN;
    if (got > 0) {
        received_.insert(received_.end(), buffer.begin(), buffer.begin() + got);
        return true;
    }
    return got < 0 && (errno == EAGAIN || errno == EINTR);
}

std::optional<Frame> Channel::cut() {
    std::uint32_t length = 0;
    const std::size_t nbytes = received_.size() - begin_;
    if (nbytes < sizeof(length)) {
        return std::nullopt;
    }
    std::memcpy(&length, received_.data() + begin_, sizeof(length));
    if (length == 0 || length > kMaxFrameBytes + 1) {
        is_nonsense_ = true;
        return std::nullopt;
    }
    if (nbytes < sizeof(length) + length) {
        return std::nullopt;
    }
    Frame frame;
    const auto* at = received_.data() + begin_ + sizeof(length);
    frame.type = std::to_integer<std::uint8_t>(*at);
    frame.payload.assign(at + 1, at + length);
    begin_ += sizeof(length) + length;
    return frame;
}

bool Channel::receive(const std::function<void(const Frame&)>& on_frame) {
    for (;;) {
        bool is_empty = false;
        const bool is_open = fill(is_empty);
        while (const auto frame = cut()) {
            on_frame(*frame);
        }
        if (!is_open || is_nonsense_) {
            return false;
        }
        if (is_empty) {
            return true;
        }
    }
}

Frame Channel::next(const Patience& patience, const std::string& label) {
    for (;;) {
        if (auto frame = cut()) {
            return std::move(*frame);
        }
        bool is_empty = false;
        if (is_nonsense_ || !fill(is_empty)) {
            throw Error(Scope::kPeer, label + " hung up while connecting", {{"peer", label}});
        }
        if (is_empty) {
            await(socket_.get(), POLLIN, patience, label + " did not answer; is it stopped?");
        }
    }
}

void Channel::shut() noexcept {
    ::shutdown(socket_.get(), SHUT_WR);
}

}  // namespace weightsync::net
