// What the two ends of the ofi fabrics say to each other: the descriptor, and frames over the
// control connection (net/channel.hpp). Addresses and keys of regions travel only there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <weightsync/codec.hpp>
#include <weightsync/fabric.hpp>

#include "../../net/address.hpp"
#include "../../net/hmac.hpp"

namespace weightsync::ofi {

struct Descriptor {
    std::uint32_t pid = 0;
    std::uint64_t target_id = 0;
    std::uint64_t generation = 0;
    net::Key key{};
    std::vector<net::Address> endpoints;  // of the control connection

    [[nodiscard]] std::vector<std::byte> encode() const;
    [[nodiscard]] static Descriptor decode(std::span<const std::byte> bytes);
};

enum class FrameType : std::uint8_t {
    kTarget = 1,  // sink, first: TargetFrame
    kRail = 2,    // sink: RailFrame and the endpoint's name, one for each rail
    kRanges = 3,  // sink: for each range RangeFrame and a RegionFrame for each rail
    kFenced = 4,  // sink: nothing lands any more
    kClosed = 5,  // sink
    // While the target lives, one rail of it:
    kFenceRail = 6,   // source: RailAttempt; let nothing land there any more
    kRailFenced = 7,  // sink: RailAttempt; so it is, and for those before it
    kOpenRail = 8,    // source: RailAttempt that was fenced; give me a later one
    kRailOpen = 9,    // sink: RailFrame and the endpoint's name, as kRail
    kRailKeys = 10,   // sink: RegionFrames, range by range, until all ranges have theirs
    kRefused = 11,    // sink: RailAttempt of the request; it cannot be opened now
    kPing = 12,       // source: PathAttempt that stands still; are you alive?
    kPong = 13,       // sink: the same
    kRailMoved = 14,  // sink: RailAttempt; as kRailFenced, but another source had asked
};

struct TargetFrame {
    std::uint32_t num_ranges = 0;
    std::uint16_t num_rails = 0;
    std::uint16_t chunk_bits = 0;
};
// Where a write of nothing but an immediate goes: not every provider can send no byte at all.
struct RegionFrame {
    std::uint64_t address = 0;
    std::uint64_t key = 0;
};
inline constexpr std::uint64_t kScratchBytes = 8;
struct RailFrame {
    std::uint64_t index = 0;
    RegionFrame scratch;
    std::uint64_t data_bytes = 0;  // of remote CQ data
    std::uint64_t attempt = 0;     // counts how often the sink built this rail of the target
};
struct RailAttempt {
    std::uint64_t rail = 0;
    std::uint64_t attempt = 0;
};
struct PathAttempt {
    std::uint64_t path = 0;
    std::uint64_t attempt = 0;
};
struct RangeFrame {
    std::uint64_t arena_offset = 0;
    std::uint64_t nbytes = 0;
};

// What the source knows of the sink after connecting.
struct TargetView {
    std::uint16_t chunk_bits = 0;
    std::vector<RangeFrame> ranges;
    struct RailView {
        RegionFrame scratch;
        std::uint64_t data_bytes = 0;
        std::uint64_t attempt = 0;
        std::vector<std::byte> name;
        std::vector<RegionFrame> regions;  // by range
    };
    std::vector<RailView> rails;
};

// Encodes a view as the payloads of kTarget, kRail and kRanges, in this order.
struct EncodedFrame {
    FrameType type;
    std::vector<std::byte> payload;
};
[[nodiscard]] std::vector<EncodedFrame> encode(const TargetView& view);
// One rail that was opened again, as kRailOpen and kRailKeys.
[[nodiscard]] std::vector<EncodedFrame> encode(std::size_t rail, const TargetView::RailView& view);

// Puts a view together again. Throws kTransfer for frames that make no sense.
class TargetReader {
  public:
    // True when the view is whole.
    [[nodiscard]] bool take(std::uint8_t type, std::span<const std::byte> payload);
    [[nodiscard]] TargetView finish() { return std::move(view_); }

  private:
    TargetView view_;
    bool has_target_ = false;
    std::size_t num_ranges_ = 0;
    std::size_t rails_left_ = 0;
};

// Puts a rail that was opened again together. Throws kTransfer for frames that make no sense.
class RailReader {
  public:
    // kRailOpen: begins anew.
    RailReader(std::span<const std::byte> payload, std::size_t num_rails, std::size_t num_ranges);
    // kRailKeys.
    void take(std::span<const std::byte> payload);
    [[nodiscard]] bool is_whole() const noexcept { return view_.regions.size() == num_ranges_; }
    [[nodiscard]] std::size_t rail() const noexcept { return rail_; }
    [[nodiscard]] TargetView::RailView finish() { return std::move(view_); }

  private:
    std::size_t num_ranges_;
    std::size_t rail_;
    TargetView::RailView view_;
};

// The payload as one Message. Throws kTransfer for another length.
template <class Message>
[[nodiscard]] Message decode_frame(std::span<const std::byte> payload) {
    ByteReader reader(payload);
    const auto message = reader.get<Message>();
    reader.expect_end();
    return message;
}

// --- remote CQ data: the immediate, and above it, where 8 bytes are carried, the length of the
// write, which not every provider tells the sink.
inline constexpr std::uint32_t kNoImmediateData = 0x80000000;
inline constexpr std::uint32_t kProbeData = 0xffffffff;  // proves a path, and is not counted

[[nodiscard]] constexpr std::uint64_t encode_data(std::int64_t immediate, std::uint64_t nbytes,
                                                  std::uint64_t data_bytes) noexcept {
    const std::uint64_t low =
        immediate < 0 ? kNoImmediateData : static_cast<std::uint64_t>(immediate);
    return data_bytes < sizeof(std::uint64_t) ? low : nbytes << 32U | low;
}

}  // namespace weightsync::ofi
