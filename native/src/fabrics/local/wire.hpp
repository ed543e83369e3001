// What two processes of one host say to each other: control memory, handshake, channels. Both run
// the same build or refuse each other by version.
#pragma once

#include <sys/socket.h>
#include <sys/un.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <weightsync/fabric.hpp>

namespace weightsync::local {

inline constexpr std::uint64_t kMagic = 0x31'4c'41'43'4f'4c'53'57;  // "WSLOCAL1"
inline constexpr std::uint32_t kWireVersion = 2;

enum class Mode : std::uint32_t { kPush = 1, kPull = 2 };

// Key of a target: whoever has its descriptor may connect, nobody else.
using Key = std::array<std::byte, 16>;

struct Descriptor {
    Mode mode = Mode::kPush;
    std::uint32_t pid = 0;
    std::uint64_t target_id = 0;
    std::uint64_t generation = 0;
    Key key{};
    std::string socket_name;  // abstract: leaves no file

    [[nodiscard]] std::vector<std::byte> encode() const;
    [[nodiscard]] static Descriptor decode(std::span<const std::byte> bytes);
};

// --- control memory: a memfd of the sink; header, ranges, block sizes, chunks per slot, board

struct ControlHeader {
    std::uint64_t magic = kMagic;
    std::uint32_t version = kWireVersion;
    Mode mode = Mode::kPush;
    std::uint64_t generation = 0;
    std::uint64_t nbytes = 0;
    std::uint32_t num_ranges = 0;
    std::uint32_t num_blocks = 0;
    std::uint32_t num_slots = 0;
    std::int32_t chunk_bits = 0;
    std::uint64_t board_offset = 0;  // 64-byte aligned; 0 in pull mode: that board is private
};
struct ControlRange {
    std::uint64_t arena_offset;
    std::uint64_t nbytes;
    std::uint64_t block;  // index; pull mode: 0
    std::uint64_t block_offset;
};

// The sink's end: writes control memory. `blocks` are the distinct blocks in the order in which
// their descriptors are sent.
struct ControlMemory {
    UniqueFd fd;
    std::shared_ptr<Mapping> mapping;
    std::byte* board = nullptr;  // null in pull mode
};
[[nodiscard]] ControlMemory write_control(const TargetSpec& spec, Mode mode,
                                          std::span<const std::shared_ptr<Block>> blocks);

// The source's end: a checked private copy of all but the board.
struct ControlView {
    std::uint64_t generation = 0;
    std::shared_ptr<const SlotTable> slots;
    std::vector<ControlRange> ranges;
    std::vector<std::uint64_t> block_bytes;
    std::shared_ptr<Mapping> mapping;
    std::byte* board = nullptr;
};
[[nodiscard]] ControlView read_control(int fd, Mode mode);

// --- handshake over a SEQPACKET socket: one request, one reply, then only hang-up matters

struct Request {  // with one descriptor: the source's eventfd, written when pulls complete
    std::uint64_t magic = kMagic;
    std::uint32_t version = kWireVersion;
    std::uint32_t padding = 0;
    std::uint64_t target_id = 0;
    std::uint64_t generation = 0;
    Key key{};
    // A number in the source's memory: reading it proves that pulling will work.
    std::uint64_t probe_address = 0;
    std::uint64_t probe_value = 0;
};
struct Reply {  // with descriptors; push: control, eventfd, blocks; pull: control, doorbell,
                // channel
    std::uint64_t magic = kMagic;
    std::uint32_t version = kWireVersion;
    std::int32_t scope = -1;  // of the error, or -1: accepted
    std::array<char, 240> message{};
};

// Limit of SCM_RIGHTS is 253.
inline constexpr std::size_t kMaxFds = 250;

void send_message(int socket, std::span<const std::byte> message, std::span<const int> fds);
// Empty when the peer hung up; nullopt when nothing is there yet.
[[nodiscard]] std::optional<std::size_t> receive_message(int socket, std::span<std::byte> message,
                                                         std::vector<UniqueFd>& fds);
template <class Message>
[[nodiscard]] std::span<std::byte> bytes_of(Message& message) {
    return std::as_writable_bytes(std::span(&message, 1));
}

// Abstract addresses begin with a zero byte and need no file.
[[nodiscard]] std::pair<sockaddr_un, socklen_t> abstract_address(const std::string& name);

struct PeerId {
    int pid = 0;
    unsigned uid = 0;
};
[[nodiscard]] PeerId peer_of(int socket);

// --- channel: one per source that is pulled from; a memfd of the sink

struct ChannelEntry {
    enum State : std::uint32_t { kFree = 0, kPosted = 1, kTaken = 2, kDone = 3 };
    std::atomic<std::uint32_t> state;
    std::int32_t scope;           // of the error, or -1
    std::int32_t error;           // as Pulled's
    std::uint32_t row;            // first that failed
    std::uint64_t table_address;  // of Write rows in the source's memory
    std::uint64_t num_rows;
    std::uint64_t notes_address;  // of Notes in the source's memory; version 0: there are none
    std::uint64_t notes_nbytes;
    std::uint64_t notes_version;
    std::array<std::byte, 8> padding;
};
static_assert(sizeof(ChannelEntry) == 64);

struct Channel {
    static constexpr std::size_t kCapacity = 256;  // batches in flight; more wait at the source
    std::uint64_t magic;
    std::atomic<std::uint32_t> is_closed;  // by the sink: fenced or closed
    // By the source: its memory may mean something else from now on, so bytes read later count for
    // nothing. The sink looks after reading and before it sets a bit.
    std::atomic<std::uint32_t> is_withdrawn;
    // By the sink, at the end: it reads the source's memory no more and has nothing of it open.
    std::atomic<std::uint32_t> has_let_go;
    std::array<std::byte, 44> padding;
    std::array<ChannelEntry, kCapacity> entries;
};

}  // namespace weightsync::local
