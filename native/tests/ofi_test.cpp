// What the ends of the ofi fabrics read from each other, honest and not.
#include <algorithm>

#include "../src/fabrics/ofi/wire.hpp"
#include "check.hpp"

namespace weightsync {
namespace {

using test::scope_of;

ofi::TargetView ofi_view(std::size_t num_rails, std::size_t num_ranges) {
    ofi::TargetView view;
    view.chunk_bits = 8;
    for (std::size_t i = 0; i < num_ranges; ++i) {
        view.ranges.push_back({i << 20, 1 << 19});
    }
    for (std::size_t rail = 0; rail < num_rails; ++rail) {
        ofi::TargetView::RailView one;
        one.scratch = {rail + 1, rail + 2};
        one.data_bytes = 8;
        one.attempt = rail + 3;
        one.name = test::pattern(20 + rail, static_cast<unsigned>(rail));
        for (std::size_t i = 0; i < num_ranges; ++i) {
            one.regions.push_back({i << 12, rail << 32 | i});
        }
        view.rails.push_back(std::move(one));
    }
    return view;
}

bool are_equal(const ofi::TargetView::RailView& a, const ofi::TargetView::RailView& b) {
    const auto same = [](const ofi::RegionFrame& x, const ofi::RegionFrame& y) {
        return x.address == y.address && x.key == y.key;
    };
    return same(a.scratch, b.scratch) && a.data_bytes == b.data_bytes && a.attempt == b.attempt &&
           a.name == b.name && std::ranges::equal(a.regions, b.regions, same);
}

TEST(ofi_targets_arrive_as_they_were_sent) {
    const ofi::TargetView view = ofi_view(3, 5000);  // several frames
    ofi::TargetReader reader;
    bool is_whole = false;
    for (const ofi::EncodedFrame& frame : ofi::encode(view)) {
        CHECK(!is_whole);
        is_whole = reader.take(static_cast<std::uint8_t>(frame.type), frame.payload);
    }
    CHECK(is_whole);
    const ofi::TargetView found = reader.finish();
    CHECK(found.chunk_bits == 8 && found.ranges.size() == 5000 && found.rails.size() == 3);
    for (std::size_t rail = 0; rail < 3; ++rail) {
        CHECK(are_equal(found.rails[rail], view.rails[rail]));
        const auto frames = ofi::encode(rail, view.rails[rail]);
        ofi::RailReader again(frames.front().payload, 3, 5000);
        for (std::size_t i = 1; i < frames.size(); ++i) {
            CHECK(!again.is_whole());
            again.take(frames[i].payload);
        }
        CHECK(again.is_whole() && again.rail() == rail);
        CHECK(are_equal(again.finish(), view.rails[rail]));
    }
}

TEST(ofi_frames_that_make_no_sense_are_refused) {
    const ofi::TargetView view = ofi_view(2, 3);
    const auto frames = ofi::encode(view);
    const auto kind = [](ofi::FrameType type) { return static_cast<std::uint8_t>(type); };
    // Cut anywhere.
    for (const ofi::EncodedFrame& frame : frames) {
        for (std::size_t nbytes = 0; nbytes < frame.payload.size(); ++nbytes) {
            ofi::TargetReader reader;
            bool is_whole = false;
            try {
                for (const ofi::EncodedFrame& other : frames) {
                    std::span<const std::byte> payload = other.payload;
                    is_whole = reader.take(kind(other.type),
                                           &other == &frame ? payload.first(nbytes) : payload);
                }
            } catch (const Error&) {
                continue;
            }
            // A name may have any length, and whole ranges may be missing.
            CHECK(frame.type == ofi::FrameType::kRail || !is_whole);
        }
    }
    ofi::TargetReader reader;
    const auto take = [&](ofi::FrameType type, std::span<const std::byte> payload) {
        return scope_of([&] { static_cast<void>(reader.take(kind(type), payload)); });
    };
    CHECK(take(ofi::FrameType::kRail, frames[1].payload) == Scope::kTransfer);  // before the target
    CHECK(take(ofi::FrameType::kRanges, frames[3].payload) == Scope::kTransfer);
    CHECK(take(ofi::FrameType::kPong, {}) == Scope::kTransfer);
    CHECK(!reader.take(kind(ofi::FrameType::kTarget), frames[0].payload));
    CHECK(take(ofi::FrameType::kTarget, frames[0].payload) == Scope::kTransfer);  // twice
    CHECK(!reader.take(kind(ofi::FrameType::kRail), frames[1].payload));
    CHECK(take(ofi::FrameType::kRail, frames[1].payload) == Scope::kTransfer);
    std::vector<std::byte> longer = frames[3].payload;
    longer.insert(longer.end(), frames[3].payload.begin(), frames[3].payload.end());
    CHECK(take(ofi::FrameType::kRanges, longer) == Scope::kTransfer);

    const auto rail = ofi::encode(1, view.rails[1]);
    const auto open = [&](std::size_t num_rails) {
        ofi::RailReader(rail[0].payload, num_rails, 3);
    };
    CHECK(scope_of([&] { open(1); }) == Scope::kTransfer);
    ofi::RailReader keys(rail[0].payload, 2, 2);
    CHECK(scope_of([&] { keys.take(rail[1].payload); }) == Scope::kTransfer);  // one too many
    for (std::size_t nbytes = 0; nbytes < sizeof(ofi::RailAttempt); ++nbytes) {
        const std::vector<std::byte> cut(nbytes);
        CHECK(scope_of([&] { static_cast<void>(ofi::decode_frame<ofi::RailAttempt>(cut)); }) ==
              Scope::kConfig);
    }
}

TEST(ofi_frames_with_random_bytes_harm_nobody) {
    const auto frames = ofi::encode(ofi_view(2, 40));
    for (unsigned seed = 0; seed < 400; ++seed) {
        const auto noise = test::pattern(64, seed);
        const auto at = [&](std::size_t i) { return static_cast<std::size_t>(noise[i]); };
        ofi::TargetReader reader;
        try {
            for (std::size_t i = 0; i < frames.size(); ++i) {
                auto payload = frames[i].payload;
                for (std::size_t k = 0; k < 3; ++k) {
                    payload[(at(k) << 8 | at(k + 3)) % payload.size()] = noise[k + 6 + i];
                }
                payload.resize(std::min(payload.size(), at(20) * 8));
                static_cast<void>(reader.take(static_cast<std::uint8_t>(frames[i].type), payload));
            }
        } catch (const Error&) {
        }
    }
}

TEST(ofi_descriptors_that_are_damaged_are_refused) {
    ofi::Descriptor descriptor;
    descriptor.pid = 7;
    descriptor.target_id = 8;
    descriptor.generation = 9;
    descriptor.endpoints = {net::Address::parse("127.0.0.1", 10), net::Address::parse("::1", 11)};
    auto bytes = descriptor.encode();
    const auto found = ofi::Descriptor::decode(bytes);
    CHECK(found.pid == 7 && found.target_id == 8 && found.generation == 9);
    CHECK(found.endpoints.size() == 2 && found.endpoints[1].port() == 11);
    const auto refused = [](std::span<const std::byte> damaged) {
        return scope_of([&] { static_cast<void>(ofi::Descriptor::decode(damaged)); });
    };
    for (std::size_t nbytes = 0; nbytes < bytes.size(); ++nbytes) {
        CHECK(refused(std::span(bytes).first(nbytes)) == Scope::kConfig);
    }
    bytes.push_back(std::byte{0});
    CHECK(refused(bytes) == Scope::kConfig);
}

}  // namespace
}  // namespace weightsync
