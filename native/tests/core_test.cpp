// Boards, ranges, leases and copies, without a fabric.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>

#include <pthread.h>
#include <sched.h>

#include <weightsync/codec.hpp>
#include <weightsync/copy.hpp>

#include "check.hpp"

namespace weightsync {
namespace {

using test::scope_of;

std::shared_ptr<const SlotTable> make_slots(std::vector<std::int32_t> chunks, int chunk_bits) {
    return std::make_shared<SlotTable>(chunks, chunk_bits);
}

TEST(board_counts_every_chunk_once_whoever_marks_it) {
    constexpr std::uint32_t kChunks = 1000;
    constexpr int kThreads = 4;
    Board board = Board::in_heap(make_slots({1, kChunks, 64}, 12), -1);
    std::atomic<int> num_new{0};
    std::vector<std::thread> threads;
    std::thread waiter([&] {
        const bool is_complete = wait_until(
            board.header().wake, [&] { return board.is_complete(1); }, Deadline::after(30));
        CHECK(is_complete);
    });
    for (int thread = 0; thread < kThreads; ++thread) {
        threads.emplace_back([&, thread] {
            Tally tally;
            for (std::uint32_t i = 0; i < kChunks; ++i) {  // all of them mark all chunks
                const std::uint32_t chunk =
                    (i * 7 + static_cast<std::uint32_t>(thread) * 250) % kChunks;
                const Mark mark = board.mark(1U << 12 | chunk);
                CHECK(mark != Mark::kUnknown);
                num_new += mark == Mark::kNew ? 1 : 0;
                tally.add(mark);
            }
            board.account(tally);
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    waiter.join();
    CHECK(num_new == kChunks);
    CHECK(board.header().arrivals == kChunks);
    CHECK(board.header().duplicates == kChunks * (kThreads - 1));
    CHECK(!board.is_complete(0) && board.missing(0).size() == 1);
    CHECK(!board.is_complete(2) && board.missing(2).size() == 64);
    board.reset(1);
    CHECK(board.missing(1).size() == kChunks);
}

TEST(board_publishes_what_was_written_before_the_bit) {
    // TSAN proves the order: plain stores by one thread, plain loads by another.
    constexpr std::uint32_t kChunks = 200;
    Board board = Board::in_heap(make_slots({kChunks}, 8), -1);
    std::vector<int> data(kChunks, 0);
    std::vector<std::thread> writers;
    for (std::uint32_t first = 0; first < 2; ++first) {
        writers.emplace_back([&, first] {
            for (std::uint32_t i = first; i < kChunks; i += 2) {
                data[i] = static_cast<int>(i) + 1;
                board.mark(i);
            }
        });
    }
    CHECK(
        wait_until(board.header().wake, [&] { return board.is_complete(0); }, Deadline::after(30)));
    CHECK(std::accumulate(data.begin(), data.end(), 0) == kChunks * (kChunks + 1) / 2);
    for (std::thread& writer : writers) {
        writer.join();
    }
}

TEST(slot_tables_are_validated) {
    for (const auto& [chunks, bits] : std::vector<std::pair<std::vector<std::int32_t>, int>>{
             {{0}, 4},
             {{17}, 4},
             {{-5}, 4},
             {{1}, 21},
             {{1}, -1},
             {std::vector<std::int32_t>(4096, 1), 20}}) {
        CHECK(scope_of([&] { SlotTable(chunks, bits); }) == Scope::kConfig);
    }
    const SlotTable table(std::vector<std::int32_t>{16, 1, 65 - 1, 65}, 7);
    CHECK(table.num_words() == 1 + 1 + 1 + 2);
    CHECK(table.full_word(3, 1) == 1 && table.full_word(2, 0) == ~std::uint64_t{0});
}

TEST(ranges_find_only_what_lies_inside) {
    const RangeTable table({{100, 50, 1}, {0, 100, 2}, {200, 10, 3}});
    CHECK(table.arena_nbytes() == 210);
    for (std::uint64_t offset = 0; offset < 220; ++offset) {
        for (std::uint64_t nbytes = 0; nbytes < 60; ++nbytes) {
            std::size_t hint = offset % 3;
            const Range* found = table.find(offset, nbytes, hint);
            const bool is_inside = std::ranges::any_of(table.ranges(), [&](const Range& range) {
                return offset >= range.arena_offset &&
                       offset + nbytes <= range.arena_offset + range.nbytes;
            });
            CHECK((found != nullptr) == is_inside);
        }
    }
    CHECK(scope_of([] { RangeTable({{0, 10, 0}, {9, 1, 0}}); }) == Scope::kConfig);
    CHECK(scope_of([] { RangeTable({{0, 0, 0}}); }) == Scope::kConfig);
}

TEST(units_cover_every_byte_once) {
    std::vector<Write> rows;
    for (const std::uint64_t nbytes :
         {0ULL, 1ULL, 100ULL, 2000ULL, 5000ULL, 0ULL, 1999ULL, 30ULL}) {
        rows.push_back({0, 0, nbytes, -1});
    }
    const CopyUnits cut = cut_units(rows, 1000, 3);
    std::vector<std::uint64_t> covered(rows.size(), 0);
    std::vector<int> whole(rows.size(), 0);
    for (const CopyUnit& unit : cut.units) {
        CHECK(unit.row_end - unit.row_begin <= 3);
        for (std::uint32_t row = unit.row_begin; row < unit.row_end; ++row) {
            covered[row] += unit.nbytes != 0 ? unit.nbytes : rows[row].nbytes;
            whole[row] += unit.nbytes == 0 || cut.take_piece(row) ? 1 : 0;
        }
    }
    for (std::size_t row = 0; row < rows.size(); ++row) {
        CHECK(covered[row] == rows[row].nbytes && whole[row] == 1);
    }
}

TEST(copies_are_exact_at_every_alignment) {
    constexpr std::size_t kRoom = 300'000;
    const auto source = test::pattern(kRoom, 1);
    for (const std::size_t nbytes : {0UL, 1UL, 63UL, 65'535UL, 65'536UL, 65'793UL, 200'000UL}) {
        for (const std::size_t at : {0UL, 1UL, 31UL, 33UL}) {
            std::vector<std::byte> sink(kRoom);
            copy_bytes(sink.data() + at, source.data() + 7, nbytes);
            CHECK(std::equal(sink.begin() + static_cast<std::ptrdiff_t>(at),
                             sink.begin() + static_cast<std::ptrdiff_t>(at + nbytes),
                             source.begin() + 7));
            const auto is_zero = [](std::byte byte) { return byte == std::byte{0}; };
            CHECK(
                std::all_of(sink.begin(), sink.begin() + static_cast<std::ptrdiff_t>(at), is_zero));
            CHECK(std::all_of(sink.begin() + static_cast<std::ptrdiff_t>(at + nbytes), sink.end(),
                              is_zero));
        }
    }
}

TEST(an_abandoned_thread_runs_where_nobody_else_wants_to) {
    // It outlives this function: what it reads must, too.
    struct Shared {
        std::atomic<int> policy{SCHED_OTHER};
        std::atomic<bool> is_over{false};
    };
    auto shared = std::make_shared<Shared>();
    abandon(std::thread([shared] {
        for (int i = 0; i < 10000 && shared->policy == SCHED_OTHER; ++i) {
            sched_param none{};
            int policy = SCHED_OTHER;
            pthread_getschedparam(pthread_self(), &policy, &none);
            shared->policy = policy;
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        shared->is_over = true;
    }));
    while (!shared->is_over) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK(shared->policy == SCHED_IDLE);
}

TEST(leases_end_only_when_nothing_reads_them) {
    LeaseTable table;
    const LeaseTable::Wait wait = [](WakeWord& word, const std::function<bool()>& ready,
                                     const Deadline& deadline) {
        return wait_until(word, ready, deadline);
    };
    const auto owner = std::make_shared<int>(1);
    const std::weak_ptr<int> weak = owner;
    auto lease = table.add(1000, 100, std::make_shared<std::shared_ptr<int>>(owner));
    const std::vector<Write> rows{{1000, 0, 50, -1}, {1050, 0, 50, -1}};
    auto pins = table.pin(rows);
    CHECK(scope_of([&] { table.release(lease, Deadline::after(0), wait); }) == Scope::kTimeout);
    CHECK(owner.use_count() == 2);
    std::thread reader([&] { table.unpin(pins); });
    table.release(lease, Deadline::after(30), wait);
    reader.join();
    CHECK(owner.use_count() == 1);
    CHECK(scope_of([&] { [[maybe_unused]] const auto none = table.pin(rows); }) == Scope::kConfig);

    auto dropped = table.add(1000, 100, std::make_shared<std::shared_ptr<int>>(owner));
    pins = table.pin(rows);
    table.abandon(dropped);
    dropped.reset();
    CHECK(table.collect().empty() && owner.use_count() == 2);
    table.unpin(pins);
    CHECK(table.collect().size() == 1);
    CHECK(owner.use_count() == 1);
}

TEST(no_lease_is_missed_by_a_new_registrar) {
    LeaseTable table;
    const auto registered = [](std::uint64_t by) {
        return [by](std::uint64_t, std::uint64_t) { return std::make_shared<std::uint64_t>(by); };
    };
    const auto by_whom = [](const std::shared_ptr<LeaseState>& lease) {
        const auto& by = lease->registrations[static_cast<std::size_t>(Registry::kNics)];
        return by ? *static_cast<std::uint64_t*>(by.get()) : 0;
    };
    // It comes while a lease is being made ...
    table.set_registrar(Registry::kNics,
                        [&](std::uint64_t, std::uint64_t) -> std::shared_ptr<void> {
                            table.set_registrar(Registry::kNics, registered(2));
                            return std::make_shared<std::uint64_t>(1);
                        });
    const auto made = table.add(4096, 64, nullptr);
    CHECK(by_whom(made) == 2);
    // ... or while one waits to be released, in vain.
    table.set_registrar(Registry::kNics, nullptr);
    const auto kept = table.add(8192, 64, nullptr);
    const std::array<Write, 1> rows{{{8192, 0, 64, -1}}};
    const std::vector<LeaseState*> pins = table.pin(rows);
    const LeaseTable::Wait wait = [&](WakeWord&, const std::function<bool()>&, const Deadline&) {
        table.set_registrar(Registry::kNics, registered(3));
        return false;
    };
    CHECK(scope_of([&] { table.release(kept, Deadline::after(0), wait); }) == Scope::kTimeout);
    CHECK(by_whom(kept) == 3);
    table.unpin(pins);
    CHECK(table.pin(rows).size() == 1);  // it lives on
    table.unpin(pins);
}

TEST(two_registries_know_the_same_leases) {
    LeaseTable table;
    const auto nics = std::make_shared<int>();
    const auto processes = std::make_shared<int>();
    const auto before = table.add(4096, 64, nullptr);
    table.set_registrar(Registry::kNics, [&](std::uint64_t, std::uint64_t) { return nics; });
    table.set_registrar(Registry::kProcesses,
                        [&](std::uint64_t, std::uint64_t) { return processes; });
    const auto after = table.add(8192, 64, nullptr);
    CHECK(nics.use_count() == 3 && processes.use_count() == 3);
    table.set_registrar(Registry::kNics, nullptr);
    const auto last = table.add(12288, 64, nullptr);
    CHECK(nics.use_count() == 3 && processes.use_count() == 4);
    for (const auto& lease : {before, after, last}) {
        table.abandon(lease);
    }
    CHECK(nics.use_count() == 1 && processes.use_count() == 1);
}

TEST(cut_descriptors_never_read_past_their_end) {
    const auto bytes = test::pattern(40, 3);
    for (std::size_t length = 0; length < bytes.size(); ++length) {
        ByteReader reader(std::span<const std::byte>(bytes).first(length));
        try {
            for (;;) {
                [[maybe_unused]] const auto word = reader.get<std::uint32_t>();
                [[maybe_unused]] const auto text = reader.get_text();
            }
        } catch (const Error& error) {
            CHECK(error.scope() == Scope::kConfig);
        }
    }
}

}  // namespace
}  // namespace weightsync
