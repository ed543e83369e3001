// Exact cover, whatever the lengths, paths and faults; and the health of paths.
#include <algorithm>
#include <map>
#include <random>
#include <thread>

#include <weightsync/rails.hpp>
#include <weightsync/send_queue.hpp>

#include "check.hpp"

namespace weightsync {
namespace {

constexpr std::uint64_t kSourceBase = 1'000'000;

struct World {
    EngineContext context;
    std::shared_ptr<RemoteInfo> remote = std::make_shared<RemoteInfo>();

    [[nodiscard]] std::shared_ptr<Operation> operation(std::vector<Write> rows) {
        return std::make_shared<Operation>(context, remote, std::move(rows),
                                           std::vector<LeaseState*>{});
    }
};

// Where bytes landed, as [begin, end) -> how often; and which immediates came when all of their
// row was there.
class Sink {
  public:
    explicit Sink(const std::vector<Write>& rows) {
        for (const Write& row : rows) {
            if (row.immediate >= 0) {
                rows_[row.immediate] = {row.destination, row.nbytes};
            }
        }
    }
    void land(const Piece& piece) {
        CHECK(piece.source == piece.destination + kSourceBase);
        if (piece.nbytes != 0) {
            landed_[piece.destination] = std::max(landed_[piece.destination], piece.nbytes);
        }
        if (piece.immediate >= 0) {
            const auto [begin, nbytes] = rows_.at(piece.immediate);
            CHECK(covered(begin, nbytes));
            ++arrivals_[piece.immediate];
        }
    }
    // No byte of [begin, begin + nbytes) is missing, and pieces do not overlap.
    [[nodiscard]] bool covered(std::uint64_t begin, std::uint64_t nbytes) const {
        std::uint64_t at = begin;
        for (auto found = landed_.find(begin); at < begin + nbytes; ++found) {
            if (found == landed_.end() || found->first != at) {
                return false;
            }
            at += found->second;
        }
        return at == begin + nbytes;
    }
    [[nodiscard]] const std::map<std::int64_t, int>& arrivals() const { return arrivals_; }

  private:
    std::map<std::uint64_t, std::uint64_t> landed_;
    std::map<std::int64_t, std::pair<std::uint64_t, std::uint64_t>> rows_;
    std::map<std::int64_t, int> arrivals_;
};

std::vector<Write> random_rows(std::mt19937_64& random, std::uint64_t max_piece, bool has_bare) {
    std::vector<Write> rows;
    std::uint64_t at = 0;
    const std::size_t count = random() % 12;
    for (std::size_t i = 0; i < count; ++i) {
        const std::array<std::uint64_t, 7> lengths{0,
                                                   1,
                                                   max_piece,
                                                   max_piece + 1,
                                                   max_piece * 3,
                                                   max_piece * 5 - 1,
                                                   random() % (max_piece * 4)};
        const std::uint64_t nbytes = lengths[random() % lengths.size()];
        const bool is_bare = has_bare && random() % 4 == 0;
        rows.push_back(
            {kSourceBase + at, at, nbytes, is_bare ? kNoImmediate : static_cast<std::int64_t>(i)});
        at += nbytes;
    }
    return rows;
}

TEST(every_byte_goes_once_whatever_the_paths_do) {
    for (std::uint64_t seed = 0; seed < 400; ++seed) {
        std::mt19937_64 random(seed);
        World world;
        const std::size_t num_paths = 1 + random() % 4;
        const std::uint64_t max_piece = 1 + random() % 5000;
        std::vector<int> wakes(num_paths, 0);
        SendQueue queue(num_paths, max_piece, [&](std::size_t path) { ++wakes[path]; });
        std::vector<std::vector<Piece>> held(num_paths);
        std::vector<std::shared_ptr<Operation>> operations;
        std::vector<Sink> sinks;
        std::vector<std::vector<Write>> tables;
        bool has_faults = seed % 2 == 1;
        std::map<std::uint64_t, std::size_t> owner;  // by destination, operations are far apart
        const std::size_t num_operations = 1 + random() % 4;
        std::size_t num_pushed = 0;
        for (int step = 0; step < 100'000; ++step) {
            const std::size_t path = random() % num_paths;
            const std::uint64_t action = random() % 10;
            if (num_pushed < num_operations && action == 0) {
                auto rows = random_rows(random, max_piece, true);
                const std::uint64_t base = num_pushed << 40U;
                for (Write& row : rows) {
                    row.source += base;
                    row.destination += base;
                }
                tables.push_back(rows);
                sinks.emplace_back(rows);
                operations.push_back(world.operation(rows));
                queue.push(operations.back());
                ++num_pushed;
            } else if (action < 5) {
                std::vector<Piece> pieces(1 + random() % 5);
                const std::size_t count = queue.take(path, random() % (2 * max_piece), pieces);
                held[path].insert(held[path].end(), pieces.begin(),
                                  pieces.begin() + static_cast<std::ptrdiff_t>(count));
            } else if (action < 9 && !held[path].empty()) {
                std::shuffle(held[path].begin(), held[path].end(), random);
                std::vector<std::uint64_t> ids;
                const std::size_t count = 1 + random() % held[path].size();
                for (std::size_t i = 0; i < count; ++i) {
                    const Piece piece = held[path].back();
                    held[path].pop_back();
                    sinks[piece.destination >> 40U].land(piece);
                    ids.push_back(piece.id);
                }
                queue.complete(path, ids);
                queue.complete(path, ids);  // a second completion changes nothing
            } else if (has_faults && action == 9) {
                std::vector<std::uint64_t> late;
                for (const Piece& piece : held[path]) {
                    late.push_back(piece.id);
                    if (random() % 2 == 0) {  // delivered, but not acknowledged
                        sinks[piece.destination >> 40U].land(piece);
                    }
                }
                held[path].clear();
                queue.leave(path);
                queue.give_back(path);
                queue.complete(path, late);
                CHECK(queue.outstanding_bytes(path) == 0);
            }
            const bool is_done =
                num_pushed == num_operations &&
                std::ranges::all_of(operations, [](const auto& one) { return one->is_done(); });
            if (is_done) {
                break;
            }
        }
        CHECK(queue.pending_bytes() == 0);
        for (std::size_t i = 0; i < num_operations; ++i) {
            CHECK(operations[i]->is_done() && operations[i]->error() == nullptr);
            for (const Write& row : tables[i]) {
                CHECK(sinks[i].covered(row.destination, row.nbytes));
                const auto arrived = sinks[i].arrivals().find(row.immediate);
                CHECK(row.immediate < 0 || (arrived != sinks[i].arrivals().end() &&
                                            (has_faults || arrived->second == 1)));
            }
        }
    }
}

TEST(five_gibibytes_are_cut_without_a_byte_more) {
    World world;
    constexpr std::uint64_t kLength = (std::uint64_t{5} << 30U) + 16385;
    constexpr std::uint64_t kMaxPiece = std::uint64_t{1} << 20U;
    SendQueue queue(3, kMaxPiece, [](std::size_t) {});
    const auto operation = world.operation({{kSourceBase, 0, kLength, 7}});
    queue.push(operation);
    std::uint64_t total = 0;
    bool has_immediate = false;
    std::array<Piece, 64> pieces;
    while (!operation->is_done()) {
        for (std::size_t path = 0; path < 3; ++path) {
            std::vector<std::uint64_t> ids;
            const std::size_t count = queue.take(path, std::uint64_t{1} << 26U, pieces);
            for (std::size_t i = 0; i < count; ++i) {
                CHECK(!has_immediate);
                has_immediate = pieces[i].immediate == 7;
                CHECK(has_immediate == (total + pieces[i].nbytes == kLength));
                CHECK(pieces[i].nbytes >= 1 && pieces[i].nbytes <= kMaxPiece);
                total += pieces[i].nbytes;
                ids.push_back(pieces[i].id);
            }
            queue.complete(path, ids);
        }
    }
    CHECK(total == kLength && has_immediate);
}

TEST(failures_wait_until_no_path_holds_a_piece) {
    World world;
    SendQueue queue(2, 100, [](std::size_t) {});
    const auto whole = world.operation({{kSourceBase, 0, 50, 0}});
    const auto cut = world.operation({{kSourceBase, 0, 250, 1}, {kSourceBase, 300, 10, 2}});
    const auto untouched = world.operation({{kSourceBase, 0, 50, 3}});
    const auto empty = world.operation({});
    for (const auto& operation : {whole, cut, untouched, empty}) {
        queue.push(operation);
    }
    CHECK(empty->is_done() && empty->error() == nullptr);
    std::array<Piece, 2> first;
    std::array<Piece, 1> second;
    CHECK(queue.take(0, 1000, first) == 2);
    CHECK(queue.take(1, 1000, second) == 1);
    queue.fail(Error(Scope::kPeer, "gone"));
    queue.fail(Error(Scope::kRail, "later"));
    CHECK(untouched->is_done() && untouched->error()->scope() == Scope::kPeer);
    CHECK(!whole->is_done() && !cut->is_done());
    queue.complete(0, std::array{first[0].id});
    CHECK(whole->is_done() && whole->error() == nullptr);  // it was complete after all
    queue.give_back(0);
    CHECK(!cut->is_done());
    queue.give_back(1);
    CHECK(cut->is_done() && cut->error()->scope() == Scope::kPeer);
    CHECK(queue.take(0, 1000, first) == 0);
    const auto late = world.operation({{kSourceBase, 0, 50, 3}});
    queue.push(late);
    CHECK(late->is_done() && late->error()->scope() == Scope::kPeer);
}

TEST(the_least_loaded_idle_path_is_woken_and_a_failing_one_passes_it_on) {
    World world;
    std::vector<std::size_t> woken;
    SendQueue queue(3, 1U << 20U, [&](std::size_t path) { woken.push_back(path); });
    std::array<Piece, 1> one;
    const auto first = world.operation({{kSourceBase, 0, 1000, 0}, {kSourceBase, 2000, 10, 1}});
    queue.push(first);
    CHECK(woken.empty());  // nobody is idle: they are still to come
    CHECK(queue.take(0, 1, one) == 1);
    const std::uint64_t large = one[0].id;
    CHECK(queue.take(1, 1, one) == 1);
    const std::uint64_t small = one[0].id;
    CHECK(queue.take(0, 1, one) == 0 && queue.take(1, 1, one) == 0 && queue.take(2, 1, one) == 0);
    queue.leave(2);
    const auto next = world.operation({{kSourceBase, 0, 10, 2}});
    queue.push(next);
    CHECK(woken == std::vector<std::size_t>{1});
    queue.leave(1);  // it died before it came
    CHECK((woken == std::vector<std::size_t>{1, 0}));
    CHECK(queue.take(0, 1, one) == 1);
    queue.complete(0, std::array{large, one[0].id});
    queue.complete(1, std::array{small});
    CHECK(first->is_done() && next->is_done());
    // A long queue wakes everybody.
    CHECK(queue.take(0, 1, one) == 0 && queue.take(1, 1, one) == 0 && queue.take(2, 1, one) == 0);
    woken.clear();
    const auto big = world.operation({{kSourceBase, 0, 8U << 20U, kNoImmediate}});
    queue.push(big);
    std::ranges::sort(woken);
    CHECK((woken == std::vector<std::size_t>{0, 1, 2}));
    queue.fail(Error(Scope::kPeer, "gone"));
    CHECK(big->is_done());
}

TEST(paths_that_were_woken_together_share_what_waits) {
    World world;
    std::vector<std::size_t> woken;
    SendQueue queue(2, 1000, [&](std::size_t path) { woken.push_back(path); });
    std::array<Piece, 16> pieces;
    CHECK(queue.take(0, 9000, pieces) == 0 && queue.take(1, 9000, pieces) == 0);
    std::vector<Write> rows;
    for (std::uint64_t i = 0; i < 8; ++i) {
        rows.push_back({kSourceBase + i * 250, i * 250, 250, static_cast<std::int64_t>(i)});
    }
    const auto operation = world.operation(std::move(rows));
    queue.push(operation);
    CHECK(woken.size() == 2);
    CHECK(queue.take(0, 9000, pieces) == 4);  // half of it, although there is room for all
    queue.complete(0, std::array{pieces[0].id, pieces[1].id, pieces[2].id, pieces[3].id});
    CHECK(queue.take(1, 9000, pieces) == 4);  // nobody is awaited any more
    queue.complete(1, std::array{pieces[0].id, pieces[1].id, pieces[2].id, pieces[3].id});
    CHECK(operation->is_done());
    // One that was woken and failed leaves its share to the other.
    CHECK(queue.take(0, 9000, pieces) == 0 && queue.take(1, 9000, pieces) == 0);
    const auto again = world.operation({{kSourceBase, 0, 600, 0}, {kSourceBase, 600, 600, 1}});
    queue.push(again);
    queue.leave(1);
    CHECK(queue.take(0, 9000, pieces) == 2);
    queue.complete(0, std::array{pieces[0].id, pieces[1].id});
    CHECK(again->is_done());
}

TEST(equal_paths_take_turns) {
    World world;
    std::vector<std::size_t> woken;
    SendQueue queue(3, 1000, [&](std::size_t path) { woken.push_back(path); });
    std::array<Piece, 1> one;
    for (std::size_t path = 0; path < 3; ++path) {
        CHECK(queue.take(path, 1000, one) == 0);
    }
    for (int i = 0; i < 6; ++i) {
        const auto operation = world.operation({{kSourceBase, 0, 10, 0}});
        queue.push(operation);
        const std::size_t path = woken.back();
        CHECK(queue.take(path, 1000, one) == 1);
        queue.complete(path, std::array{one[0].id});
        CHECK(operation->is_done() && queue.take(path, 1000, one) == 0);
    }
    std::ranges::sort(woken);
    CHECK((woken == std::vector<std::size_t>{0, 0, 1, 1, 2, 2}));
}

TEST(many_threads_share_a_queue) {
    World world;
    constexpr std::size_t kPaths = 3;
    SendQueue queue(kPaths, 64, [](std::size_t) {});
    std::atomic<bool> is_over{false};
    std::atomic<std::uint64_t> total{0};
    std::vector<std::thread> threads;
    for (std::size_t path = 0; path < kPaths; ++path) {
        threads.emplace_back([&, path] {
            std::mt19937_64 random(path);
            std::array<Piece, 8> pieces;
            while (!is_over) {
                std::vector<std::uint64_t> ids;
                const std::size_t count = queue.take(path, 200, pieces);
                if (path == 0 && random() % 8 == 0) {
                    queue.give_back(path);
                    continue;
                }
                for (std::size_t i = 0; i < count; ++i) {
                    total += pieces[i].nbytes;
                    ids.push_back(pieces[i].id);
                }
                queue.complete(path, ids);
            }
        });
    }
    std::uint64_t expected = 0;
    std::vector<std::shared_ptr<Operation>> operations;
    for (int i = 0; i < 200; ++i) {
        std::vector<Write> rows;
        for (std::uint64_t row = 0; row < 10; ++row) {
            rows.push_back({kSourceBase, 0, row * 37, static_cast<std::int64_t>(row)});
            expected += row * 37;
        }
        operations.push_back(world.operation(std::move(rows)));
        queue.push(operations.back());
    }
    const Deadline deadline = Deadline::after(30);
    for (const auto& operation : operations) {
        while (!operation->is_done() && !deadline.passed()) {
            std::this_thread::yield();
        }
        CHECK(operation->is_done() && operation->error() == nullptr);
    }
    is_over = true;
    for (std::thread& thread : threads) {
        thread.join();
    }
    CHECK(total == expected);
}

TEST(a_rail_is_in_the_worst_state_of_its_paths) {
    // As Engine.rails() of the Python face lists them; all fabrics rank alike.
    constexpr std::array<std::string_view, 5> kOrder = {"idle", "active", "probing", "quarantined",
                                                        "fencing"};
    for (std::size_t i = 0; i < kOrder.size(); ++i) {
        for (std::size_t j = 0; j < kOrder.size(); ++j) {
            CHECK(worse_state(kOrder[i], kOrder[j]) == kOrder[std::max(i, j)]);
        }
    }
}

TEST(paths_are_quarantined_twice_as_long_each_time) {
    using std::chrono::seconds;
    PathHealth health;
    PathHealth::Time now{seconds(1000)};
    CHECK(health.state() == PathState::kActive);
    std::int64_t length = 1;
    for (int round = 0; round < 9; ++round) {
        CHECK(health.fail(now));
        CHECK(!health.fail(now));
        CHECK(health.state() == PathState::kFencing && !health.is_usable());
        health.probing();
        CHECK(health.state() == PathState::kFencing);  // never before the fence
        health.fenced(now);
        CHECK(health.state() == PathState::kQuarantined);
        CHECK(health.probe_time() == now + seconds(length));
        length = std::min<std::int64_t>(length * 2, 60);
        now = health.probe_time();
        CHECK(health.begin_probe() == static_cast<std::uint32_t>(round) + 1);
        health.probing();
        CHECK(health.is_usable());
        health.succeeded(now);
        CHECK(health.state() == PathState::kActive);
    }
    now += seconds(61);
    CHECK(health.fail(now));
    health.fenced(now);
    CHECK(health.probe_time() == now + seconds(1));
    health.probe_failed(now);
    CHECK(health.probe_time() == now + seconds(2) && health.state() == PathState::kQuarantined);
}

}  // namespace
}  // namespace weightsync
