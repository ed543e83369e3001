// The control connection that stays open beside the data: framed messages, any thread sends, one
// receives. A frame is {length u32, type u8, payload of length - 1 bytes}.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <weightsync/os.hpp>

#include "dial.hpp"

namespace weightsync::net {

inline constexpr std::size_t kMaxFrameBytes = std::size_t{64} << 10;  // of a payload

struct Frame {
    std::uint8_t type = 0;
    std::vector<std::byte> payload;
};

class Channel {
  public:
    // Of an accepted or dialled, non-blocking socket.
    explicit Channel(UniqueFd socket) : socket_(std::move(socket)) {}

    [[nodiscard]] int socket() const noexcept { return socket_.get(); }

    // Never blocks. What the socket does not take waits for flush(). False when the connection is
    // broken or the peer has left a megabyte unread: hang up then.
    bool send(std::uint8_t type, std::span<const std::byte> payload = {});
    // When the socket became writable (watch it with EPOLLOUT | EPOLLET).
    bool flush();
    // Nothing waits for flush().
    [[nodiscard]] bool is_idle();

    // Takes everything that has arrived and calls `on_frame` for each whole frame. False when the
    // peer has hung up or sent nonsense.
    bool receive(const std::function<void(const Frame&)>& on_frame);
    // Blocks for one frame, before the channel is watched by a reactor. Throws kTimeout, kPeer.
    [[nodiscard]] Frame next(const Patience& patience, const std::string& label);

    // Tells the peer that nothing more comes, after what was sent.
    void shut() noexcept;

  private:
    [[nodiscard]] bool flush_locked();
    // Reads once; false at the end of the stream or on an error.
    [[nodiscard]] bool fill(bool& is_empty);
    [[nodiscard]] std::optional<Frame> cut();

    UniqueFd socket_;
    std::mutex mutex_;  // unsent_, is_broken_
    std::vector<std::byte> unsent_;
    bool is_broken_ = false;
    // Of the thread that receives.
    std::vector<std::byte> received_;
    std::size_t begin_ = 0;
    bool is_nonsense_ = false;
};

}  // namespace weightsync::net
