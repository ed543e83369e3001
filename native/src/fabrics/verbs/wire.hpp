// What the two ends of a verbs connection say over their control connection.
//
// The sink speaks first: kWelcome and as many kRanges as it takes. Then the source opens paths,
// each with one queue pair on either side, and asks for a path to be fenced when it has failed.
// The control connection is authenticated (net/), so keys of memory travel nowhere else.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <weightsync/codec.hpp>
#include <weightsync/ranges.hpp>

#include "queue_pair.hpp"

namespace weightsync::verbs {

enum class Type : std::uint8_t {
    kWelcome = 1,
    kRanges = 2,
    kOpen = 3,     // source: make a queue pair for this path
    kOpened = 4,   // sink: here it is, ready to receive
    kRefused = 5,  // sink: it cannot be made
    kFence = 6,    // source: the path is dead
    kFenced = 7,   // sink: nothing of it can land any more
    kGone = 8,     // sink: the target was fenced or closed
    kFailed = 9,   // sink: its end of the path does not work any more
};

struct Welcome {
    std::uint16_t num_rails = 0;
    std::uint16_t chunk_bits = 0;
    std::uint32_t num_ranges = 0;
    std::uint32_t max_message_bytes = 0;  // the smallest of the rails'
};

struct RemoteRange {
    Range range;                       // base: address at the sink
    std::vector<std::uint32_t> rkeys;  // by rail of the sink
};

struct PathName {
    std::uint16_t path = 0;
    std::uint16_t sink_rail = 0;
    std::uint32_t attempt = 0;
};

// Of kOpen and kOpened. `num_receives`: how many immediates it can take in before it is read.
struct PathEnd {
    PathName name;
    std::uint32_t num_receives = 0;
    Endpoint endpoint;
};

inline std::vector<std::byte> encode(const Welcome& welcome) {
    return ByteWriter()
        .put(welcome.num_rails)
        .put(welcome.chunk_bits)
        .put(welcome.num_ranges)
        .put(welcome.max_message_bytes)
        .take();
}

inline Welcome decode_welcome(std::span<const std::byte> bytes) {
    ByteReader reader(bytes);
    Welcome welcome;
    welcome.num_rails = reader.get<std::uint16_t>();
    welcome.chunk_bits = reader.get<std::uint16_t>();
    welcome.num_ranges = reader.get<std::uint32_t>();
    welcome.max_message_bytes = reader.get<std::uint32_t>();
    reader.expect_end();
    return welcome;
}

inline void put(ByteWriter& writer, const RemoteRange& range) {
    writer.put(range.range.arena_offset).put(range.range.nbytes).put(range.range.base);
    for (const std::uint32_t rkey : range.rkeys) {
        writer.put(rkey);
    }
}

[[nodiscard]] inline std::size_t range_bytes(std::size_t num_rails) noexcept {
    return 3 * sizeof(std::uint64_t) + num_rails * sizeof(std::uint32_t);
}

inline RemoteRange get_range(ByteReader& reader, std::size_t num_rails) {
    RemoteRange range;
    range.range.arena_offset = reader.get<std::uint64_t>();
    range.range.nbytes = reader.get<std::uint64_t>();
    range.range.base = reader.get<std::uint64_t>();
    for (std::size_t i = 0; i < num_rails; ++i) {
        range.rkeys.push_back(reader.get<std::uint32_t>());
    }
    return range;
}

inline ByteWriter& put(ByteWriter& writer, const PathName& name) {
    return writer.put(name.path).put(name.sink_rail).put(name.attempt);
}

inline PathName get_name(ByteReader& reader) {
    PathName name;
    name.path = reader.get<std::uint16_t>();
    name.sink_rail = reader.get<std::uint16_t>();
    name.attempt = reader.get<std::uint32_t>();
    return name;
}

inline std::vector<std::byte> encode(const PathName& name) {
    ByteWriter writer;
    return put(writer, name).take();
}

inline std::vector<std::byte> encode(const PathEnd& end) {
    ByteWriter writer;
    return put(writer, end.name)
        .put(end.num_receives)
        .put(end.endpoint.gid)
        .put(end.endpoint.qp_num)
        .put(end.endpoint.psn)
        .put(end.endpoint.lid)
        .put(end.endpoint.mtu)
        .put(end.endpoint.link_layer)
        .take();
}

inline PathEnd decode_end(std::span<const std::byte> bytes) {
    ByteReader reader(bytes);
    PathEnd end;
    end.name = get_name(reader);
    end.num_receives = reader.get<std::uint32_t>();
    end.endpoint.gid = reader.get<Gid>();
    end.endpoint.qp_num = reader.get<std::uint32_t>();
    end.endpoint.psn = reader.get<std::uint32_t>();
    end.endpoint.lid = reader.get<std::uint16_t>();
    end.endpoint.mtu = reader.get<std::uint8_t>();
    end.endpoint.link_layer = reader.get<std::uint8_t>();
    reader.expect_end();
    return end;
}

inline PathName decode_name(std::span<const std::byte> bytes) {
    ByteReader reader(bytes);
    const PathName name = get_name(reader);
    reader.expect_end();
    return name;
}

}  // namespace weightsync::verbs
