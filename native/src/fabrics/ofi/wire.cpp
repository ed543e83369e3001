#include "wire.hpp"

#include <algorithm>

#include <weightsync/codec.hpp>

#include "../../net/channel.hpp"

namespace weightsync::ofi {

namespace {

constexpr std::size_t kMaxRails = 64;
constexpr std::size_t kMaxRanges = std::size_t{1} << 20;
constexpr std::size_t kMaxEndpoints = 64;

std::vector<std::byte> encode_rail(std::size_t index, const TargetView::RailView& rail) {
    ByteWriter writer;
    writer.put(RailFrame{index, rail.scratch, rail.data_bytes, rail.attempt}).put_bytes(rail.name);
    return writer.take();
}

void read_rail(const RailFrame& head, std::span<const std::byte> name, TargetView::RailView& rail) {
    rail.scratch = head.scratch;
    rail.data_bytes = head.data_bytes;
    rail.attempt = head.attempt;
    rail.name.assign(name.begin(), name.end());
}

[[noreturn]] void throw_nonsense(const char* what) {
    throw Error(Scope::kTransfer, std::string("the sink sent ") + what +
                                      "; do both sides run the same version of weightsync?");
}

}  // namespace

std::vector<std::byte> Descriptor::encode() const {
    ByteWriter writer;
    writer.put(pid).put(target_id).put(generation).put(key);
    writer.put(static_cast<std::uint8_t>(endpoints.size()));
    for (const net::Address& endpoint : endpoints) {
        writer.put_text(endpoint.host()).put(endpoint.port());
    }
    return writer.take();
}

Descriptor Descriptor::decode(std::span<const std::byte> bytes) {
    ByteReader reader(bytes);
    Descriptor descriptor;
    descriptor.pid = reader.get<std::uint32_t>();
    descriptor.target_id = reader.get<std::uint64_t>();
    descriptor.generation = reader.get<std::uint64_t>();
    descriptor.key = reader.get<net::Key>();
    const auto count = reader.get<std::uint8_t>();
    if (count == 0 || count > kMaxEndpoints) {
        throw Error(Scope::kConfig, "descriptor names no endpoint; it is damaged");
    }
    for (std::size_t i = 0; i < count; ++i) {
        const std::string host = reader.get_text();
        descriptor.endpoints.push_back(net::Address::parse(host, reader.get<std::uint16_t>()));
    }
    reader.expect_end();
    return descriptor;
}

std::vector<EncodedFrame> encode(const TargetView& view) {
    std::vector<EncodedFrame> frames;
    ByteWriter head;
    head.put(TargetFrame{static_cast<std::uint32_t>(view.ranges.size()),
                         static_cast<std::uint16_t>(view.rails.size()), view.chunk_bits});
    frames.push_back({FrameType::kTarget, head.take()});
    for (std::size_t i = 0; i < view.rails.size(); ++i) {
        frames.push_back({FrameType::kRail, encode_rail(i, view.rails[i])});
    }
    const std::size_t bytes_each = sizeof(RangeFrame) + view.rails.size() * sizeof(RegionFrame);
    const std::size_t num_each = std::max<std::size_t>(net::kMaxFrameBytes / bytes_each, 1);
    for (std::size_t begin = 0; begin < view.ranges.size(); begin += num_each) {
        ByteWriter writer;
        for (std::size_t i = begin; i < std::min(begin + num_each, view.ranges.size()); ++i) {
            writer.put(view.ranges[i]);
            for (const TargetView::RailView& rail : view.rails) {
                writer.put(rail.regions[i]);
            }
        }
        frames.push_back({FrameType::kRanges, writer.take()});
    }
    return frames;
}

std::vector<EncodedFrame> encode(std::size_t rail, const TargetView::RailView& view) {
    std::vector<EncodedFrame> frames;
    frames.push_back({FrameType::kRailOpen, encode_rail(rail, view)});
    constexpr std::size_t kEach = net::kMaxFrameBytes / sizeof(RegionFrame);
    for (std::size_t begin = 0; begin < view.regions.size(); begin += kEach) {
        ByteWriter writer;
        for (std::size_t i = begin; i < std::min(begin + kEach, view.regions.size()); ++i) {
            writer.put(view.regions[i]);
        }
        frames.push_back({FrameType::kRailKeys, writer.take()});
    }
    return frames;
}

RailReader::RailReader(std::span<const std::byte> payload, std::size_t num_rails,
                       std::size_t num_ranges)
    : num_ranges_(num_ranges) {
    ByteReader reader(payload);
    const auto head = reader.get<RailFrame>();
    if (head.index >= num_rails || reader.rest().empty()) {
        throw_nonsense("a rail that makes no sense");
    }
    rail_ = head.index;
    read_rail(head, reader.rest(), view_);
}

void RailReader::take(std::span<const std::byte> payload) {
    ByteReader reader(payload);
    while (!reader.rest().empty()) {
        if (is_whole()) {
            throw_nonsense("more keys than it has ranges");
        }
        view_.regions.push_back(reader.get<RegionFrame>());
    }
}

bool TargetReader::take(std::uint8_t type, std::span<const std::byte> payload) {
    ByteReader reader(payload);
    switch (static_cast<FrameType>(type)) {
        case FrameType::kTarget: {
            const auto head = reader.get<TargetFrame>();
            if (has_target_ || head.num_rails == 0 || head.num_rails > kMaxRails ||
                head.num_ranges > kMaxRanges) {
                throw_nonsense("a target that makes no sense");
            }
            has_target_ = true;
            view_.chunk_bits = head.chunk_bits;
            view_.rails.resize(head.num_rails);
            rails_left_ = head.num_rails;
            num_ranges_ = head.num_ranges;
            break;
        }
        case FrameType::kRail: {
            const auto head = reader.get<RailFrame>();
            if (head.index >= view_.rails.size() || !view_.rails[head.index].name.empty() ||
                reader.rest().empty()) {
                throw_nonsense("a rail that makes no sense");
            }
            read_rail(head, reader.rest(), view_.rails[head.index]);
            --rails_left_;
            break;
        }
        case FrameType::kRanges:
            while (!reader.rest().empty() && view_.ranges.size() < num_ranges_) {
                view_.ranges.push_back(reader.get<RangeFrame>());
                for (TargetView::RailView& rail : view_.rails) {
                    rail.regions.push_back(reader.get<RegionFrame>());
                }
            }
            if (!reader.rest().empty()) {
                throw_nonsense("more ranges than it has");
            }
            break;
        default:
            throw_nonsense("an unknown message");
    }
    return has_target_ && rails_left_ == 0 && view_.ranges.size() == num_ranges_;
}

}  // namespace weightsync::ofi
