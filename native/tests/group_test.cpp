// Counters, scatters, barriers and messages from many threads at once.
#include <algorithm>
#include <array>
#include <cstring>
#include <thread>

#include <weightsync/fabrics.hpp>
#include <weightsync/group.hpp>
#include <weightsync/scatter.hpp>
#include <weightsync/sim.hpp>

#include "check.hpp"

namespace weightsync {
namespace {

using test::address_of;
using test::scope_of;

constexpr double kWait_s = 30;

struct Fleet {
    std::vector<std::shared_ptr<Engine>> engines;
    [[nodiscard]] std::vector<std::shared_ptr<PeerGroup>> open(std::uint32_t window) const {
        std::vector<std::shared_ptr<PeerGroup>> members;
        const auto size = static_cast<std::uint32_t>(engines.size());
        for (std::uint32_t i = 0; i < size; ++i) {
            members.push_back(engines[i]->open_group(
                {.index = i, .size = size, .message_bytes = 100, .window = window}));
        }
        for (const auto& member : members) {
            for (std::uint32_t other = 0; other < size; ++other) {
                member->connect(other, members[other]->descriptor(), Deadline::after(kWait_s));
            }
        }
        return members;
    }
};

std::vector<Fleet> all_fleets() {
    constexpr int kEngines = 3;
    std::vector<Fleet> fleets(2);
    const auto wire = SimWire::make(3, true);
    wire->set_faults("", {.reorder = true, .delay_s = 1e-3});
    for (int i = 0; i < kEngines; ++i) {
        const std::string name = "member" + std::to_string(i);
        fleets[0].engines.push_back(Engine::open(name, [](EngineContext& context) {
            return make_local_fabric(context, {.num_threads = 1});
        }));
        fleets[1].engines.push_back(
            Engine::open(name, [wire](EngineContext& context) { return wire->attach(context); }));
    }
    return fleets;
}

TEST(a_counter_keeps_what_comes_while_it_is_emptied) {
    constexpr std::uint64_t kEach = 20'000;
    constexpr std::uint64_t kThreads = 3;
    const auto slots = std::make_shared<SlotTable>(std::vector<std::int32_t>{1, kCounter, 65}, 7);
    CHECK(slots->num_words() == 1 + kCounterWords + 2);
    Board board = Board::in_heap(slots, -1);
    std::vector<std::thread> writers;
    for (std::uint64_t thread = 0; thread < kThreads; ++thread) {
        writers.emplace_back([&] {
            for (std::uint32_t i = 0; i < kEach; ++i) {
                CHECK(board.mark(1U << 7 | i % 128) == Mark::kNew);
            }
        });
    }
    std::uint64_t taken = 0;
    while (taken < kEach * kThreads) {
        const std::uint64_t wanted = std::min<std::uint64_t>(997, kEach * kThreads - taken);
        board.expect(1, wanted);
        CHECK(wait_until(
            board.header().wake, [&] { return board.is_complete(1); }, Deadline::after(kWait_s)));
        board.reset(1);
        taken += wanted;
    }
    for (std::thread& writer : writers) {
        writer.join();
    }
    CHECK(board.count(1) == 0 && !board.is_complete(1));
    CHECK(board.missing(0).size() == 1 && board.missing(1).empty() &&
          board.missing(2).size() == 65);
}

TEST(a_wait_that_was_over_is_not_asked_again) {
    // Of two receivers the slower one found what it had waited for taken: no timeout.
    const Fleet fleet = all_fleets().front();
    const auto memory = fleet.engines[0]->allocate(64, true);
    RangeRequest range;
    range.nbytes = 64;
    range.lease = memory->lease();
    range.block = memory->block();
    const auto target =
        fleet.engines[0]->export_target({range}, std::vector<std::int32_t>{1}, 0, 1);
    bool is_there = true;
    const auto take = [&is_there] { return std::exchange(is_there, false); };
    CHECK(target->wait_for(take, Deadline::after(kWait_s)));
    CHECK(!target->wait_for(take, Deadline::after(0)));
}

TEST(pages_are_checked_before_they_are_rows) {
    const std::vector<std::int64_t> one{0, 2, 1};
    const std::vector<std::int64_t> two{5, 4, 3};
    const auto rows = expand_pages({.page_bytes = 7,
                                    .source = {one, 10, 1000},
                                    .destination = {two, 20, 3},
                                    .immediates = {},
                                    .first_immediate = 16},
                                   2);
    CHECK(rows.size() == 3 && rows[1].source == 1020 && rows[1].destination == 83);
    CHECK(rows[2].immediate == 18 && rows[0].nbytes == 7);
    const std::vector<std::int64_t> huge{0, INT64_MAX, 1};
    const std::vector<std::int64_t> negative{0, 1, -1};
    const auto scope = [](const Pages& source, const Pages& destination, std::int64_t first) {
        PagedWrite bad;
        bad.page_bytes = 1;
        bad.source = source;
        bad.destination = destination;
        bad.first_immediate = first;
        return scope_of([&] { [[maybe_unused]] const auto none = expand_pages(bad, 2); });
    };
    const Pages good{one, 1, 0};
    CHECK(scope({huge, 4, 0}, good, 0) == Scope::kConfig);
    CHECK(scope(good, {negative, 1, 0}, 0) == Scope::kConfig);
    CHECK(scope({one, -4, 0}, good, 0) == Scope::kConfig);
    CHECK(scope({one, 4, UINT64_MAX}, good, 0) == Scope::kConfig);
    CHECK(scope(good, good, 18) == Scope::kConfig);  // the third chunk leaves the slot
}

TEST(a_simulated_write_that_comes_after_the_close_fails_at_once) {
    // A thread may be past the engine's own check. Its write stayed on the wire, longer than the
    // engine lived.
    const auto wire = SimWire::make(1, true);
    EngineContext* inside = nullptr;
    const auto engine = Engine::open("one", [&](EngineContext& context) {
        inside = &context;
        return wire->attach(context);
    });
    const auto memory = engine->allocate(64, true);
    RangeRequest range;
    range.nbytes = 64;
    range.lease = memory->lease();
    range.block = memory->block();
    const auto target = engine->export_target({range}, std::vector<std::int32_t>{1}, 0, 1);
    // Without the engine's own head: what the wire put in.
    const std::vector<std::byte> descriptor = target->descriptor();
    const auto own = std::span(descriptor).last(3 * sizeof(std::uint64_t));
    const auto port = inside->fabric->connect(own, Deadline::after(kWait_s));
    port->close();
    const auto operation = std::make_shared<Operation>(
        *inside, port->info(), std::vector<Write>{{0, 0, 0, 0}}, std::vector<LeaseState*>{});
    port->post(operation);
    CHECK(operation->is_done() && operation->error() != nullptr);
}

TEST(barriers_of_threads_keep_them_together) {
    constexpr int kTurns = 60;
    for (const Fleet& fleet : all_fleets()) {
        const auto members = fleet.open(1);
        std::array<std::atomic<int>, 3> passed{};
        std::vector<std::thread> threads;
        for (std::size_t member = 0; member < members.size(); ++member) {
            threads.emplace_back([&, member] {
                for (int turn = 0; turn < kTurns; ++turn) {
                    members[member]->barrier(Deadline::after(kWait_s));
                    passed[member].store(turn + 1);
                    for (const auto& other : passed) {
                        CHECK(other.load() >= turn && other.load() <= turn + 2);
                    }
                }
            });
        }
        for (std::thread& thread : threads) {
            thread.join();
        }
    }
}

TEST(messages_of_many_threads_keep_the_order_of_each) {
    constexpr int kMessages = 120;
    for (const Fleet& fleet : all_fleets()) {
        const auto members = fleet.open(3);
        std::vector<std::thread> threads;
        for (std::size_t sender = 1; sender < members.size(); ++sender) {
            threads.emplace_back([&, sender] {
                for (int i = 0; i < kMessages; ++i) {
                    std::array<std::byte, sizeof(int)> bytes{};
                    std::memcpy(bytes.data(), &i, sizeof(i));
                    const auto operation =
                        members[sender]->send(0, bytes, Deadline::after(kWait_s));
                    if (i % 16 == 0) {
                        operation->wait(Deadline::after(kWait_s));
                    }
                }
            });
        }
        std::array<int, 3> next{};
        for (int i = 0; i < 2 * kMessages; ++i) {
            const Message message =
                members[0]->receive(PeerGroup::kAnyMember, Deadline::after(kWait_s));
            int number = 0;
            CHECK(message.bytes.size() == sizeof(number));
            std::memcpy(&number, message.bytes.data(), sizeof(number));
            CHECK(number == next[message.member]++);
        }
        for (std::thread& thread : threads) {
            thread.join();
        }
        CHECK(!members[0]->try_receive(PeerGroup::kAnyMember));
    }
}

TEST(groups_close_while_others_wait) {
    for (const Fleet& fleet : all_fleets()) {
        const auto members = fleet.open(1);
        std::vector<std::thread> threads;
        const std::vector<std::byte> bytes(10);
        const auto expect_end = [](const std::function<void()>& call) {
            const Scope scope = scope_of(call);
            CHECK(scope != Scope::kTimeout && scope != Scope::kInternal);
        };
        threads.emplace_back(
            [&] { expect_end([&] { members[0]->barrier(Deadline::after(kWait_s)); }); });
        threads.emplace_back([&] {
            expect_end([&] {
                [[maybe_unused]] const auto none =
                    members[0]->receive(PeerGroup::kAnyMember, Deadline::after(kWait_s));
            });
        });
        threads.emplace_back([&] {
            expect_end([&] {
                for (;;) {
                    [[maybe_unused]] const auto operation =
                        members[0]->send(1, bytes, Deadline::after(kWait_s));
                }
            });
        });
        members[0]->close();
        for (std::thread& thread : threads) {
            thread.join();
        }
    }
}

TEST(a_scatter_is_done_when_all_of_it_is) {
    constexpr std::size_t kBytes = 300'000;  // more than is copied at once
    for (const Fleet& fleet : all_fleets()) {
        const auto payload = test::pattern(2 * kBytes, 9);
        const auto lease =
            fleet.engines[0]->add_lease(address_of(payload), payload.size(), nullptr);
        std::vector<std::shared_ptr<Memory>> memories;
        std::vector<std::shared_ptr<Target>> targets;
        std::vector<std::shared_ptr<Remote>> remotes;
        std::vector<Write> rows;
        for (std::size_t i = 0; i < 2; ++i) {
            memories.push_back(fleet.engines[i + 1]->allocate(kBytes, true));
            RangeRequest range;
            range.nbytes = kBytes;
            range.lease = memories[i]->lease();
            range.block = memories[i]->block();
            targets.push_back(
                fleet.engines[i + 1]->export_target({range}, std::vector<std::int32_t>{1}, 0, 1));
            remotes.push_back(
                fleet.engines[0]->connect(targets[i]->descriptor(), Deadline::after(kWait_s)));
            rows.push_back({address_of(payload) + i * kBytes, 0, kBytes, 0});
        }
        const std::vector<std::int32_t> peers{0, 1};
        const auto operation = fleet.engines[0]->scatter(remotes, rows, peers);
        operation->wait(Deadline::after(kWait_s));
        CHECK(operation->is_done() && !operation->error() && operation->nbytes() == 2 * kBytes);
        for (std::size_t i = 0; i < 2; ++i) {
            targets[i]->wait(std::array{0}, Deadline::after(kWait_s));
            CHECK(std::equal(memories[i]->data(), memories[i]->data() + kBytes,
                             payload.begin() + static_cast<std::ptrdiff_t>(i * kBytes)));
        }
        targets[1]->fence(true);
        const auto failed = fleet.engines[0]->scatter(remotes, rows, peers);
        CHECK(scope_of([&] { failed->wait(Deadline::after(kWait_s)); }) == Scope::kFenced);
        CHECK(failed->is_done());
        rows[1].destination = 1;
        CHECK(scope_of([&] {
                  [[maybe_unused]] const auto none =
                      fleet.engines[0]->scatter(remotes, rows, peers);
              }) == Scope::kConfig);
        lease->release(Deadline::after(kWait_s));
    }
}

}  // namespace
}  // namespace weightsync
