// What the two ends of a tcp target say to each other once a connection is authenticated. All
// little-endian.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <weightsync/codec.hpp>

#include "../../net/hmac.hpp"

namespace weightsync::tcp {

// A data stream is a sequence of blocks: a BlockHeader, num_writes times a BlockWrite, and the
// payloads one after the other. The sink answers whole blocks on the same socket, with an Ack of
// the last one that is placed and marked.
inline constexpr std::uint16_t kBlockMagic = 0x5742;  // "BW"
inline constexpr std::size_t kMaxBlockWrites = 64;
inline constexpr std::uint64_t kBlockBytes = std::uint64_t{1} << 20;

struct BlockHeader {
    std::uint16_t magic = kBlockMagic;
    std::uint16_t num_writes = 0;  // 1 .. kMaxBlockWrites
    std::uint32_t number = 0;      // counts from 0 on each stream
    std::uint32_t flags = 0;       // none yet
    std::uint32_t reserved = 0;
};
static_assert(sizeof(BlockHeader) == 16);

struct BlockWrite {
    std::uint64_t offset = 0;  // in the sink's arena
    std::uint64_t nbytes = 0;
    std::int32_t immediate = -1;
    std::uint32_t reserved = 0;
};
static_assert(sizeof(BlockWrite) == 24);

// No block is shorter than this: a sink may always read so far without taking payload for a header.
struct BlockHead {
    BlockHeader header;
    BlockWrite first;
};
static_assert(sizeof(BlockHead) == 40);

inline constexpr std::uint32_t kAckMagic = 0x4B434157;  // "WACK"
struct Ack {
    std::uint32_t magic = kAckMagic;
    std::uint32_t number = 0;
};
static_assert(sizeof(Ack) == 8);

// Frames of the control connection.
enum class Say : std::uint8_t {
    kRanges = 1,   // sink: Range64 each; several frames when there are many
    kWelcome = 2,  // sink: Welcome, after the last kRanges
    kFence = 3,    // source: PathAttempt; let nothing of it land any more
    kFenced = 4,   // sink: PathAttempt; so it is
    kBye = 5,      // sink: the target was fenced or closed
    kPing = 6,     // source: PathAttempt that stands still; are you alive?
    kPong = 7,     // sink: the same
};

struct Range64 {
    std::uint64_t arena_offset = 0;
    std::uint64_t nbytes = 0;
};
struct Welcome {
    std::uint64_t num_ranges = 0;
    std::int32_t chunk_bits = 0;
    std::uint32_t reserved = 0;
};
struct PathAttempt {
    std::uint32_t path = 0;
    std::uint32_t attempt = 0;
};

inline constexpr std::size_t kMaxRails = 64;

struct Descriptor {
    std::uint32_t pid = 0;
    std::uint64_t target_id = 0;
    std::uint64_t generation = 0;
    net::Key key{};
    std::vector<std::pair<std::string, std::uint16_t>> endpoints;  // one per rail of the sink

    [[nodiscard]] std::vector<std::byte> encode() const {
        ByteWriter writer;
        writer.put(pid).put(target_id).put(generation).put(key);
        writer.put(static_cast<std::uint16_t>(endpoints.size()));
        for (const auto& [host, port] : endpoints) {
            writer.put_text(host).put(port);
        }
        return writer.take();
    }
    [[nodiscard]] static Descriptor decode(std::span<const std::byte> bytes) {
        ByteReader reader(bytes);
        Descriptor descriptor;
        descriptor.pid = reader.get<std::uint32_t>();
        descriptor.target_id = reader.get<std::uint64_t>();
        descriptor.generation = reader.get<std::uint64_t>();
        descriptor.key = reader.get<net::Key>();
        const auto count = reader.get<std::uint16_t>();
        if (count == 0 || count > kMaxRails) {
            throw Error(Scope::kConfig,
                        "descriptor names " + std::to_string(count) + " addresses; it is damaged");
        }
        for (std::uint16_t i = 0; i < count; ++i) {
            std::string host = reader.get_text();
            descriptor.endpoints.emplace_back(std::move(host), reader.get<std::uint16_t>());
        }
        reader.expect_end();
        return descriptor;
    }
};

}  // namespace weightsync::tcp
