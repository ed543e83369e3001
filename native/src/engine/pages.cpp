#include <weightsync/pages.hpp>

#include <string>

#include <weightsync/error.hpp>

namespace weightsync {

namespace {

void check_list(const Pages& pages, const char* side) {
    if (pages.stride < 0) {
        throw Error(Scope::kConfig,
                    std::string(side) + " stride " + std::to_string(pages.stride) + " is negative");
    }
}

std::uint64_t place_of(const Pages& pages, std::size_t page, const char* side) {
    const std::int64_t index = pages.indices[page];
    std::uint64_t distance = 0;
    std::uint64_t place = 0;
    if (index < 0 ||
        __builtin_mul_overflow(static_cast<std::uint64_t>(index),
                               static_cast<std::uint64_t>(pages.stride), &distance) ||
        __builtin_add_overflow(distance, pages.offset, &place)) {
        throw Error(Scope::kConfig,
                    "page " + std::to_string(page) + ": " + side + " index " +
                        std::to_string(index) + " leaves all memory",
                    {{"row", static_cast<std::int64_t>(page)}});
    }
    return place;
}

}  // namespace

std::vector<Write> expand_pages(const PagedWrite& pages, int chunk_bits) {
    check_list(pages.source, "source");
    check_list(pages.destination, "destination");
    const std::size_t count = pages.source.indices.size();
    if (pages.destination.indices.size() != count ||
        (!pages.immediates.empty() && pages.immediates.size() != count)) {
        throw Error(Scope::kConfig, std::to_string(count) + " source pages, " +
                                        std::to_string(pages.destination.indices.size()) +
                                        " destination pages and " +
                                        std::to_string(pages.immediates.size()) +
                                        " immediates do not belong together");
    }
    if (count > kMaxRows) {
        throw Error(Scope::kConfig, std::to_string(count) + " pages in one write; at most " +
                                        std::to_string(kMaxRows) + " are taken");
    }
    const bool is_counted_up = pages.immediates.empty() && pages.first_immediate >= 0;
    if (is_counted_up) {
        const std::uint64_t limit = std::uint64_t{1} << chunk_bits;
        const std::uint64_t chunk = static_cast<std::uint64_t>(pages.first_immediate) & (limit - 1);
        if (count > limit - chunk) {
            throw Error(Scope::kConfig,
                        std::to_string(count) + " pages from immediate " +
                            std::to_string(pages.first_immediate) +
                            " on leave its slot, which has room for " +
                            std::to_string(limit - chunk) +
                            " more chunks (chunk_bits=" + std::to_string(chunk_bits) + ")");
        }
    }
    std::vector<Write> rows(count);
    for (std::size_t i = 0; i < count; ++i) {
        Write& row = rows[i];
        row.source = place_of(pages.source, i, "source");
        row.destination = place_of(pages.destination, i, "destination");
        row.nbytes = pages.page_bytes;
        if (is_counted_up) {
            row.immediate = pages.first_immediate + static_cast<std::int64_t>(i);
        } else {
            row.immediate = pages.immediates.empty() ? pages.first_immediate : pages.immediates[i];
        }
    }
    return rows;
}

}  // namespace weightsync
