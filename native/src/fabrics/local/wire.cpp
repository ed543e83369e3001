#include "wire.hpp"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <new>

#include <weightsync/codec.hpp>

namespace weightsync::local {

namespace {

constexpr std::uint64_t kMaxEntries = std::uint64_t{1} << 24;

std::uint64_t align64(std::uint64_t value) noexcept {
    return (value + 63) / 64 * 64;
}

// Where the parts of control memory begin.
struct ControlParts {
    explicit ControlParts(const ControlHeader& header)
        : ranges(sizeof(ControlHeader)),
          blocks(ranges + std::uint64_t{header.num_ranges} * sizeof(ControlRange)),
          slots(blocks + std::uint64_t{header.num_blocks} * sizeof(std::uint64_t)),
          board(align64(slots + std::uint64_t{header.num_slots} * sizeof(std::int32_t))) {}
    std::uint64_t ranges;
    std::uint64_t blocks;
    std::uint64_t slots;
    std::uint64_t board;
};

[[noreturn]] void throw_damaged(const char* what) {
    throw Error(Scope::kTransfer, std::string("a peer sent damaged control memory: ") + what);
}

}  // namespace

std::vector<std::byte> Descriptor::encode() const {
    ByteWriter writer;
    writer.put(mode).put(pid).put(target_id).put(generation).put(key).put_text(socket_name);
    return writer.take();
}

Descriptor Descriptor::decode(std::span<const std::byte> bytes) {
    ByteReader reader(bytes);
    Descriptor result;
    result.mode = reader.get<Mode>();
    result.pid = reader.get<std::uint32_t>();
    result.target_id = reader.get<std::uint64_t>();
    result.generation = reader.get<std::uint64_t>();
    result.key = reader.get<Key>();
    result.socket_name = reader.get_text();
    reader.expect_end();
    constexpr std::size_t kMaxName = sizeof(sockaddr_un::sun_path) - 1;
    if ((result.mode != Mode::kPush && result.mode != Mode::kPull) ||
        result.socket_name.size() > kMaxName) {
        throw Error(Scope::kConfig, "the descriptor is damaged");
    }
    return result;
}

ControlMemory write_control(const TargetSpec& spec, Mode mode,
                            std::span<const std::shared_ptr<Block>> blocks) {
    ControlHeader header;
    header.mode = mode;
    header.generation = spec.generation;
    header.num_ranges = static_cast<std::uint32_t>(spec.exported.size());
    header.num_blocks = static_cast<std::uint32_t>(blocks.size());
    header.num_slots = spec.slots->num_slots();
    header.chunk_bits = spec.slots->chunk_bits();
    const ControlParts parts(header);
    header.nbytes = parts.board;
    if (mode == Mode::kPush) {
        header.board_offset = parts.board;
        header.nbytes += Board::storage_bytes(*spec.slots);
    }

    ControlMemory control;
    control.fd = make_memfd("weightsync-control", file_bytes(header.nbytes));
    control.mapping = std::make_shared<Mapping>(control.fd.get(), file_bytes(header.nbytes));
    control.mapping->populate();
    std::byte* base = control.mapping->data();
    std::memcpy(base, &header, sizeof(header));
    std::byte* at = base + parts.ranges;
    for (const ExportedRange& range : spec.exported) {
        const auto block = std::ranges::find(blocks, range.block) - blocks.begin();
        const ControlRange row{range.arena_offset, range.nbytes,
                               mode == Mode::kPush ? static_cast<std::uint64_t>(block) : 0,
                               range.block_offset};
        std::memcpy(at, &row, sizeof(row));
        at += sizeof(row);
    }
    for (const auto& block : blocks) {
        const std::uint64_t nbytes = block->mapped_nbytes();
        std::memcpy(at, &nbytes, sizeof(nbytes));
        at += sizeof(nbytes);
    }
    for (std::uint32_t slot = 0; slot < header.num_slots; ++slot) {
        const auto chunks = static_cast<std::int32_t>(spec.slots->num_chunks(slot));
        std::memcpy(at, &chunks, sizeof(chunks));
        at += sizeof(chunks);
    }
    if (mode == Mode::kPush) {
        control.board = base + parts.board;
        new (control.board) Board::Header;
    }
    return control;
}

ControlView read_control(int fd, Mode mode) {
    ControlView view;
    const std::uint64_t nbytes = sealed_bytes(fd);
    if (nbytes < sizeof(ControlHeader)) {
        throw_damaged("too short");
    }
    view.mapping = std::make_shared<Mapping>(fd, nbytes);
    const std::byte* base = view.mapping->data();
    ControlHeader header;
    std::memcpy(&header, base, sizeof(header));
    if (header.magic != kMagic || header.version != kWireVersion || header.mode != mode) {
        throw_damaged("not of this version of weightsync");
    }
    if (header.num_ranges > kMaxEntries || header.num_blocks > kMaxFds ||
        header.num_slots > kMaxEntries) {
        throw_damaged("absurd counts");
    }
    const ControlParts parts(header);
    if (parts.board > nbytes) {
        throw_damaged("tables leave the memory");
    }
    view.generation = header.generation;
    const auto read_table = [base](auto& table, std::uint64_t offset, std::size_t count) {
        table.resize(count);
        if (count != 0) {
            std::memcpy(table.data(), base + offset, count * sizeof(table[0]));
        }
    };
    std::vector<std::int32_t> chunks;
    read_table(view.ranges, parts.ranges, header.num_ranges);
    read_table(view.block_bytes, parts.blocks, header.num_blocks);
    read_table(chunks, parts.slots, header.num_slots);
    view.slots = std::make_shared<SlotTable>(chunks, header.chunk_bits);
    if (mode == Mode::kPush) {
        if (header.board_offset != parts.board ||
            parts.board + Board::storage_bytes(*view.slots) > nbytes) {
            throw_damaged("board leaves the memory");
        }
        view.board = view.mapping->data() + parts.board;
    }
    return view;
}

std::pair<sockaddr_un, socklen_t> abstract_address(const std::string& name) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(&address.sun_path[1], name.data(), name.size());
    return {address, static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size())};
}

void send_message(int socket, std::span<const std::byte> message, std::span<const int> fds) {
    iovec part{const_cast<std::byte*>(message.data()), message.size()};
    msghdr header{};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    alignas(cmsghdr) std::array<char, CMSG_SPACE(kMaxFds * sizeof(int))> buffer{};
    if (!fds.empty()) {
        header.msg_control = buffer.data();
        header.msg_controllen = CMSG_SPACE(fds.size_bytes());
        cmsghdr* control = CMSG_FIRSTHDR(&header);
        control->cmsg_level = SOL_SOCKET;
        control->cmsg_type = SCM_RIGHTS;
        control->cmsg_len = CMSG_LEN(fds.size_bytes());
        std::memcpy(CMSG_DATA(control), fds.data(), fds.size_bytes());
    }
    if (::sendmsg(socket, &header, MSG_NOSIGNAL) < 0) {
        const int error = errno;
        const bool is_gone = error == EPIPE || error == ECONNRESET;
        throw os_error(is_gone ? Scope::kPeer : Scope::kTransfer, "sendmsg", error,
                       "the peer went away while connecting");
    }
}

std::optional<std::size_t> receive_message(int socket, std::span<std::byte> message,
                                           std::vector<UniqueFd>& fds) {
    iovec part{message.data(), message.size()};
    msghdr header{};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    alignas(cmsghdr) std::array<char, CMSG_SPACE(kMaxFds * sizeof(int))> buffer{};
    header.msg_control = buffer.data();
    header.msg_controllen = buffer.size();
    const ssize_t got = ::recvmsg(socket, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (got < 0) {
        const int error = errno;
        if (error == EAGAIN || error == EINTR) {
            return std::nullopt;
        }
        if (error == ECONNRESET) {
            return 0;
        }
        throw os_error(Scope::kTransfer, "recvmsg", error, "");
    }
    for (cmsghdr* control = CMSG_FIRSTHDR(&header); control != nullptr;
         control = CMSG_NXTHDR(&header, control)) {
        if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        const std::size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (std::size_t i = 0; i < count; ++i) {
            int fd = -1;
            std::memcpy(&fd, CMSG_DATA(control) + i * sizeof(int), sizeof(int));
            fds.emplace_back(fd);
        }
    }
    if ((header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) {
        throw Error(Scope::kTransfer,
                    "a message of a peer was cut; check `ulimit -n` and that both sides run the "
                    "same version of weightsync");
    }
    return static_cast<std::size_t>(got);
}

PeerId peer_of(int socket) {
    ucred credentials{};
    socklen_t length = sizeof(credentials);
    if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) {
        throw os_error(Scope::kAuth, "getsockopt(SO_PEERCRED)", errno, "");
    }
    return {credentials.pid, credentials.uid};
}

}  // namespace weightsync::local
