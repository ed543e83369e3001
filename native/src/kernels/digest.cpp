#include "digest.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

namespace weightsync::kernels {

static_assert(std::endian::native == std::endian::little,
              "units are little-endian halves of codes");

namespace {

// How far ahead of the reads memory is requested: hardware prefetchers stop at pages and at runs.
constexpr std::int64_t kPrefetchBytes = 4096;

// A loop over one dim: a stride in memory and a stream of keys. The default is one iteration with
// the key 1: mix(0) is 0, and keys are made odd.
struct KeyLoop {
    std::int64_t n = 1;
    std::int64_t stride = 0;
    std::uint64_t state = 0;
    std::uint64_t delta = 0;
};

struct KeyLoops {
    int count = 0;
    KeyLoop at[kDims];

    // Keeps the loops sorted outermost first: memory is walked in order of address.
    void insert(const KeyLoop& loop) noexcept {
        int place = count++;
        for (; place > 0 && std::abs(at[place - 1].stride) < std::abs(loop.stride); --place) {
            at[place] = at[place - 1];
        }
        at[place] = loop;
    }
    void erase(int place) noexcept {
        --count;
        for (; place < count; ++place) {
            at[place] = at[place + 1];
        }
    }
};

// Calls leaf(data, multiplier) for every iteration of `count` nested loops.
template <class Leaf>
void nest(const KeyLoop* loops, int count, const std::byte* data, Multiplier multiplier,
          const Leaf& leaf) {
    if (count == 0) {
        leaf(data, multiplier);
        return;
    }
    std::uint64_t state = loops->state;
    for (std::int64_t i = 0; i < loops->n; ++i) {
        nest(loops + 1, count - 1, data, multiplier * key_at(state), leaf);
        data += loops->stride;
        state += loops->delta;
    }
}

// low + (high << 16) == key mod 2^32, with a signed low half.
std::pair<std::int16_t, std::int16_t> split_key(std::uint32_t key) noexcept {
    const auto low = static_cast<std::int16_t>(key);
    const auto high = static_cast<std::int16_t>((key - static_cast<std::uint32_t>(low)) >> 16);
    return {low, high};
}

void copy_items(const std::byte* data, std::int64_t stride, std::int64_t n, std::int64_t item,
                std::byte* out) {
    const auto copy = [=]<std::size_t kItem>(std::integral_constant<std::size_t, kItem>) {
        for (std::int64_t i = 0; i < n; ++i) {
            std::memcpy(out + i * static_cast<std::int64_t>(kItem), data + i * stride, kItem);
        }
    };
    switch (item) {
        case 1:
            return copy(std::integral_constant<std::size_t, 1>{});
        case 2:
            return copy(std::integral_constant<std::size_t, 2>{});
        case 4:
            return copy(std::integral_constant<std::size_t, 4>{});
        default:
            return copy(std::integral_constant<std::size_t, 8>{});
    }
}

class RowDigest {
  public:
    RowDigest(const DigestRow& row, const DigestKernels& kernels,
              std::byte* copy = nullptr) noexcept
        : row_(row),
          copy_(copy),
          dot_(copy != nullptr     ? kernels.strip16_copy
               : row.itemsize == 1 ? kernels.strip8
                                   : kernels.strip16),
          units_(row.itemsize == 1 ? 1 : row.itemsize / 2),
          base_(key_at(KeyStream(row.seed, KeyFamily::kTensor, 0).state)) {
        for (int d = 0; d < kDims - 1; ++d) {
            const auto family = static_cast<KeyFamily>(d + 1);
            const KeyStream keys(row.seed, family, row.lo[d]);
            if (row.n[d] == 1) {
                base_ = base_ * key_at(keys.state);
            } else {
                loops_.insert({row.n[d], row.stride[d], keys.state,
                               static_cast<std::uint64_t>(row.step[d]) * kGamma});
            }
        }
    }

    Multiplier run() noexcept {
        const bool is_contiguous =
            row_.n[3] > 1 && row_.step[3] == 1 && row_.stride[3] == row_.itemsize;
        for (int place = 0; place < loops_.count && !is_contiguous; ++place) {
            const KeyLoop loop = loops_.at[place];
            // Shorter loops gain less than the weights cost.
            if (loop.stride == row_.itemsize && loop.n >= 16) {
                loops_.erase(place);
                add_weighted(loop);
                return sum_;
            }
        }
        add_segments();
        return sum_;
    }

  private:
    [[nodiscard]] std::int64_t first_unit(std::int64_t i) const noexcept {
        return (row_.lo[3] + row_.step[3] * i) * units_;
    }

    void add(Multiplier multiplier, Multiplier dot) noexcept {
        sum_.lane0 += multiplier.lane0 * dot.lane0;
        sum_.lane1 += multiplier.lane1 * dot.lane1;
    }

    // The last dim innermost: segment after segment, or many at once where memory is dense.
    void add_segments() noexcept {
        // Bounds the table of segments; runs of 512 KiB are long enough.
        constexpr std::int64_t kMostSegments = 64;
        Segment segments[kMostSegments];
        const std::int64_t n = row_.n[3];
        const std::int64_t spacing = n == 1 ? 1 : key_spacing();
        const bool is_dense = spacing == 1 && (row_.step[3] == 1 || n == 1);
        // Spaced keys fill the gaps of memory with zeros, and must fit the same table.
        const std::int64_t most_items = kSegment / units_ / std::max<std::int64_t>(1, spacing);
        for (std::int64_t first = 0; first < n;) {
            std::int64_t count = 0;
            std::int64_t i = first;
            for (; i < n && count < (is_dense ? kMostSegments : 1); ++count) {
                const std::int64_t unit = first_unit(i);
                const std::int64_t segment = unit / kSegment;
                const std::int64_t left =
                    ((segment + 1) * kSegment - unit) / units_;  // elements, if step 1
                const std::int64_t items =
                    std::min({n - i, most_items, (left + row_.step[3] - 1) / row_.step[3]});
                const auto at = static_cast<std::size_t>(unit % kSegment);
                segments[count] = {(i - first) * row_.itemsize, items * units_,
                                   short_keys().lane[0].data() + at,
                                   short_keys().lane[1].data() + at,
                                   key_at(KeyStream(row_.seed, KeyFamily::kRun, segment).state)};
                i += items;
            }
            const std::byte* data = row_.data + first * row_.stride[3];
            if (is_dense) {
                add_runs(data, {segments, static_cast<std::size_t>(count)},
                         (i - first) * row_.itemsize);
            } else {
                add_scattered(data, segments[0], i - first, spacing);
            }
            first = i;
        }
    }

    // Distance of neighbours of the last dim in elements, where it is small enough that reading the
    // gaps too (their keys are 0) costs no more than gathering; else 0.
    [[nodiscard]] std::int64_t key_spacing() const noexcept {
        const std::int64_t spacing = row_.stride[3] / row_.itemsize;
        const bool is_spaced = row_.stride[3] % row_.itemsize == 0 && spacing >= 1 && spacing <= 4;
        return is_spaced ? spacing : 0;
    }

    void add_runs(const std::byte* data, std::span<const Segment> segments,
                  std::int64_t run_bytes) noexcept {
        // Without a loop the strip is one run, whose key is 1.
        const int num_outer = std::max(0, loops_.count - 1);
        const KeyLoop inner = loops_.count > 0 ? loops_.at[num_outer] : KeyLoop{};
        std::int64_t ahead = kPrefetchBytes;
        if (inner.n > 1 && inner.stride != run_bytes) {
            ahead = inner.stride * ((kPrefetchBytes + run_bytes - 1) / run_bytes);
        }
        nest(loops_.at, num_outer, data, base_, [&](const std::byte* at, Multiplier outer) {
            std::byte* copy = copy_ == nullptr ? nullptr : copy_ + (at - row_.data);
            add(outer, dot_({at, inner.stride, inner.n, inner.state, inner.delta, segments.data(),
                             static_cast<std::int64_t>(segments.size()), ahead, copy}));
        });
    }

    // `items` elements in one segment that are not neighbours in memory or not in the tensor.
    void add_scattered(const std::byte* data, Segment segment, std::int64_t items,
                       std::int64_t spacing) noexcept {
        std::int16_t picked[kLanes][kSegment + kKeyPadding] = {};
        const std::int64_t to = units_ * std::max<std::int64_t>(1, spacing);
        const std::int64_t from = units_ * row_.step[3];
        for (std::int64_t i = 0; i < items; ++i) {
            std::copy_n(segment.keys0 + i * from, units_, picked[0] + i * to);
            std::copy_n(segment.keys1 + i * from, units_, picked[1] + i * to);
        }
        segment.keys0 = picked[0];
        segment.keys1 = picked[1];
        segment.length = (items - 1) * to + units_;
        if (spacing > 0) {
            add_runs(data, {&segment, 1}, items * row_.stride[3]);
            return;
        }
        std::byte gathered[2 * kSegment];
        nest(loops_.at, loops_.count, data, base_, [&](const std::byte* at, Multiplier outer) {
            copy_items(at, row_.stride[3], items, row_.itemsize, gathered);
            add(outer, dot_({gathered, 0, 1, 0, 0, &segment, 1, 0}));
        });
    }

    // Another dim innermost, because that one is contiguous in memory. Its keys have 32 bits: as
    // two tables of 16 bits they go through the same loop, low * unit + ((high * unit) << 16).
    void add_weighted(const KeyLoop& inner) noexcept {
        constexpr std::int64_t kTile = 2048;  // four tables take 16 KiB of L1
        std::int16_t low[kLanes][kTile + kKeyPadding];
        std::int16_t high[kLanes][kTile + kKeyPadding];
        Segment lows{0, 0, low[0], low[1], {}};
        Segment highs{0, 0, high[0], high[1], {}};
        std::uint64_t state = inner.state;
        for (std::int64_t first = 0; first < inner.n; first += kTile) {
            const std::int64_t n = std::min(kTile, inner.n - first);
            for (std::int64_t i = 0; i < n; ++i) {
                const Multiplier key = key_at(state);
                state += inner.delta;
                std::tie(low[0][i], high[0][i]) = split_key(key.lane0);
                std::tie(low[1][i], high[1][i]) = split_key(key.lane1);
            }
            lows.length = highs.length = n;
            nest(loops_.at, loops_.count, row_.data + first * inner.stride, base_,
                 [&](const std::byte* data, Multiplier outer) {
                     add_columns(data, outer, lows, highs);
                 });
        }
    }

    // All elements of the last dim, each with a run of the weighted dim.
    void add_columns(const std::byte* data, Multiplier outer, const Segment& lows,
                     const Segment& highs) noexcept {
        const ShortKeys& table = short_keys();
        std::byte gathered[2 * kSegment];
        std::int64_t segment = -1;
        Multiplier segment_key;
        for (std::int64_t i = 0; i < row_.n[3]; ++i, data += row_.stride[3]) {
            const std::int64_t unit = first_unit(i);
            if (unit / kSegment != segment) {
                segment = unit / kSegment;
                segment_key = outer * key_at(KeyStream(row_.seed, KeyFamily::kRun, segment).state);
            }
            for (std::int64_t h = 0; h < units_; ++h) {
                const std::byte* units = data;
                if (units_ > 1) {
                    copy_items(data + 2 * h, row_.itemsize, lows.length, 2, gathered);
                    units = gathered;
                }
                const Multiplier x = dot_({units, 0, 1, 0, 0, &lows, 1, row_.stride[3]});
                const Multiplier y = dot_({units, 0, 1, 0, 0, &highs, 1, 0});
                const auto at = static_cast<std::size_t>((unit + h) % kSegment);
                const Multiplier key{static_cast<std::uint32_t>(std::int32_t{table.lane[0][at]}),
                                     static_cast<std::uint32_t>(std::int32_t{table.lane[1][at]})};
                add(segment_key * key, {x.lane0 + (y.lane0 << 16), x.lane1 + (y.lane1 << 16)});
            }
        }
    }

    const DigestRow& row_;
    std::byte* copy_;  // nullptr: digest only
    StripDot dot_;
    std::int64_t units_;  // per element
    Multiplier base_;     // key of the tensor and of the dims that have one index
    KeyLoops loops_;
    Multiplier sum_{0, 0};
};

}  // namespace

DigestRow DigestRow::load(const std::int64_t* columns) noexcept {
    DigestRow row;
    row.data = reinterpret_cast<const std::byte*>(columns[0]);
    row.itemsize = columns[1];
    row.seed = static_cast<std::uint64_t>(columns[2]);
    for (int d = 0; d < kDims; ++d) {
        row.lo[d] = columns[3 + d];
        row.step[d] = columns[7 + d];
        row.n[d] = columns[11 + d];
        row.stride[d] = columns[15 + d];
    }
    return row;
}

const char* check_digest_row(const std::int64_t* columns) noexcept {
    const std::int64_t item = columns[1];
    if (item != 1 && item != 2 && item != 4 && item != 8) {
        return "itemsize is not 1, 2, 4 or 8";
    }
    const auto is_negative = [](std::int64_t value) { return value < 0; };
    if (std::any_of(columns + 3, columns + 7, is_negative)) {
        return "negative index";
    }
    if (std::any_of(columns + 7, columns + 11, [](std::int64_t step) { return step < 1; })) {
        return "step below 1";
    }
    return std::any_of(columns + 11, columns + 15, is_negative) ? "negative size" : nullptr;
}

Multiplier digest_row(const DigestRow& row, const DigestKernels& kernels) noexcept {
    if (row.size_bytes() == 0) {
        return {0, 0};
    }
    return RowDigest(row, kernels).run();
}

bool can_digest_copy(const DigestRow& row, const std::byte* copy,
                     const DigestKernels& kernels) noexcept {
    const std::int64_t units = row.itemsize / 2;
    return kernels.strip16_copy != nullptr && units > 0 && row.step[3] == 1 && row.n[3] > 1 &&
           row.n[3] * units % kCopyUnits == 0 && row.lo[3] * units % kCopyUnits == 0 &&
           reinterpret_cast<std::uintptr_t>(copy) % kCopyAlignment == 0;
}

Multiplier digest_copy_row(const DigestRow& row, std::byte* copy,
                           const DigestKernels& kernels) noexcept {
    return RowDigest(row, kernels, copy).run();
}

void GroupSums::add(std::int64_t row, Multiplier lanes) noexcept {
    std::uint64_t& sum = sums_[static_cast<std::size_t>(group_[static_cast<std::size_t>(row)])];
    const auto plus = [lanes](std::uint64_t old) {
        const std::uint32_t lane0 = static_cast<std::uint32_t>(old) + lanes.lane0;
        const std::uint32_t lane1 = static_cast<std::uint32_t>(old >> 32) + lanes.lane1;
        return std::uint64_t{lane1} << 32 | lane0;
    };
    if (!is_shared_) {
        sum = plus(sum);
        return;
    }
    std::atomic_ref shared(sum);
    std::uint64_t old = shared.load(std::memory_order_relaxed);
    while (!shared.compare_exchange_weak(old, plus(old), std::memory_order_relaxed)) {
    }
}

void digest(std::span<const std::int64_t> table, std::span<const std::int32_t> group,
            std::span<std::uint64_t> sums, int threads, Isa isa) {
    const DigestKernels& kernels = digest_kernels(isa);
    GroupSums groups(sums, group, threads > 1);
    for_each_row(
        static_cast<std::int64_t>(group.size()), threads,
        [&](std::int64_t i) { return DigestRow::load(table.data() + i * kDigestColumns); },
        [&](std::int64_t i, const DigestRow& row) { groups.add(i, digest_row(row, kernels)); });
}

}  // namespace weightsync::kernels
