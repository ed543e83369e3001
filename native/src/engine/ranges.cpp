#include <weightsync/ranges.hpp>

#include <algorithm>

#include <weightsync/error.hpp>

namespace weightsync {

RangeTable::RangeTable(std::vector<Range> ranges) : ranges_(std::move(ranges)) {
    std::ranges::sort(ranges_, {}, &Range::arena_offset);
    std::uint64_t end = 0;
    for (const Range& range : ranges_) {
        const std::string what = "range at arena offset " + std::to_string(range.arena_offset) +
                                 " of " + std::to_string(range.nbytes) + " bytes";
        if (range.nbytes == 0 || range.nbytes > kMaxBytes || range.arena_offset > kMaxBytes) {
            throw Error(Scope::kConfig, what + " is empty or beyond any memory");
        }
        if (range.arena_offset < end) {
            throw Error(Scope::kConfig,
                        what + " overlaps the one before it, which ends at " + std::to_string(end));
        }
        end = range.arena_offset + range.nbytes;
    }
    arena_nbytes_ = end;
}

const Range* RangeTable::find(std::uint64_t offset, std::uint64_t nbytes,
                              std::size_t& hint) const noexcept {
    const auto holds = [&](const Range& range) {
        return offset >= range.arena_offset && nbytes <= range.nbytes &&
               offset - range.arena_offset <= range.nbytes - nbytes;
    };
    for (std::size_t i = hint; i < std::min(hint + 2, ranges_.size()); ++i) {
        if (holds(ranges_[i])) {
            hint = i;
            return &ranges_[i];
        }
    }
    const auto after = std::ranges::upper_bound(ranges_, offset, {}, &Range::arena_offset);
    if (after == ranges_.begin() || !holds(*(after - 1))) {
        return nullptr;
    }
    hint = static_cast<std::size_t>(after - 1 - ranges_.begin());
    return &ranges_[hint];
}

void RangeTable::check(std::span<const Write> rows, const std::string& peer) const {
    if (rows.size() > kMaxRows) {
        throw Error(Scope::kConfig, std::to_string(rows.size()) + " writes in one post; at most " +
                                        std::to_string(kMaxRows) + " are taken");
    }
    std::size_t hint = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
        const Write& row = rows[i];
        if (find(row.destination, row.nbytes, hint) == nullptr) {
            throw Error(Scope::kConfig,
                        "write " + std::to_string(i) + " to " + peer + " (arena offset " +
                            std::to_string(static_cast<std::int64_t>(row.destination)) + ", " +
                            std::to_string(static_cast<std::int64_t>(row.nbytes)) +
                            " bytes) leaves the exported ranges of an arena of " +
                            std::to_string(arena_nbytes_) +
                            " bytes; nothing was written. Do both sides have the same plan?",
                        {{"peer", peer}, {"row", static_cast<std::int64_t>(i)}});
        }
        if (row.immediate < kNoImmediate || row.immediate > INT32_MAX) {
            throw Error(Scope::kConfig,
                        "write " + std::to_string(i) + " to " + peer + " has immediate " +
                            std::to_string(row.immediate) + "; give 0 .. 2^31 - 1, or -1 for none",
                        {{"peer", peer}, {"row", static_cast<std::int64_t>(i)}});
        }
    }
}

std::uint64_t RangeTable::common_base() const noexcept {
    std::uint64_t common = 0;
    for (const Range& range : ranges_) {
        const std::uint64_t base = range.base - range.arena_offset;
        if (common != 0 && base != common) {
            return 0;
        }
        common = base;
    }
    return common;
}

std::uint64_t total_bytes(std::span<const Write> rows) noexcept {
    std::uint64_t total = 0;
    for (const Write& row : rows) {
        total += row.nbytes;
    }
    return total;
}

}  // namespace weightsync
