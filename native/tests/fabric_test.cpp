// Fabrics from many threads at once: what the sanitizers are for.
#include <thread>

#include <weightsync/fabrics.hpp>
#include <weightsync/sim.hpp>

#include "check.hpp"

namespace weightsync {
namespace {

using test::address_of;
using test::scope_of;

struct Pair {
    std::shared_ptr<Engine> source;
    std::shared_ptr<Engine> sink;
    bool is_private;
};

std::shared_ptr<Engine> open_local(const char* name) {
    return Engine::open(name, [](EngineContext& context) {
        return make_local_fabric(context, {.num_threads = 2});
    });
}

std::shared_ptr<Engine> open_sim(const std::shared_ptr<SimWire>& wire, const char* name) {
    return Engine::open(name, [wire](EngineContext& context) { return wire->attach(context); });
}

std::shared_ptr<Engine> open_tcp(const char* name, std::vector<std::string> addresses = {}) {
    return Engine::open(name, [&](EngineContext& context) {
        return make_tcp_fabric(context, {.addresses = std::move(addresses)});
    });
}

std::shared_ptr<Engine> open_mixed(const char* name) {
    return Engine::open(name, [](EngineContext& context) {
        return make_behind(context, {.fabric = "local"}, make_tcp_fabric(context, {}));
    });
}

std::shared_ptr<Engine> open_ofi(const char* name, const char* provider, bool is_registered) {
    return Engine::open(name, [&](EngineContext& context) {
        OfiOptions options;
        options.provider = provider;
        options.addresses = {"127.0.0.1", "127.0.0.2"};
        options.registers_sources = is_registered;
        return make_ofi_fabric(context, options);
    });
}

// Whatever libfabric this machine has.
void add_ofi_pairs(std::vector<Pair>& pairs) {
    try {
        pairs.push_back({open_ofi("source", "tcp", true), open_ofi("sink", "tcp", false), true});
        pairs.push_back({open_ofi("source", "shm", false), open_ofi("sink", "shm", false), false});
    } catch (const Error& error) {
        CHECK(error.scope() == Scope::kConfig);
        std::printf("  without ofi: %s\n", error.what());
    }
}

std::vector<Pair> all_pairs() {
    const auto wire = SimWire::make(3, true);
    wire->set_faults("", {.reorder = true, .delay_s = 1e-3, .duplicate = 0.2, .late_s = 1e-3});
    std::vector<Pair> pairs{{open_tcp("source"), open_tcp("sink"), true},
                            {open_tcp("source", {"127.0.0.1", "127.0.0.2"}),
                             open_tcp("sink", {"127.0.0.1", "127.0.0.2", "127.0.0.3"}), false},
                            {open_local("source"), open_local("sink"), false},
                            {open_local("source"), open_local("sink"), true},
                            {open_mixed("source"), open_mixed("sink"), true},
                            {open_mixed("source"), open_mixed("sink"), false},
                            {open_sim(wire, "source"), open_sim(wire, "sink"), true}};
    add_ofi_pairs(pairs);
    return pairs;
}

// Memory of a sink, shared or private, that can be exported again and again.
struct Arena {
    Arena(const Pair& pair, std::size_t nbytes) : sink(pair.sink), size(nbytes) {
        if (pair.is_private) {
            bytes.resize(nbytes);
            lease = sink->add_lease(address_of(bytes), nbytes, nullptr);
        } else {
            memory = sink->allocate(nbytes, true);
        }
    }
    [[nodiscard]] const std::byte* data() const { return memory ? memory->data() : bytes.data(); }
    [[nodiscard]] std::shared_ptr<Target> open(std::vector<std::int32_t> chunks,
                                               std::uint64_t generation) const {
        RangeRequest range;
        range.nbytes = size;
        range.lease = memory ? memory->lease() : lease->state();
        range.block = memory ? memory->block() : nullptr;
        return sink->export_target({range}, chunks, 8, generation);
    }
    std::shared_ptr<Engine> sink;
    std::size_t size;
    std::vector<std::byte> bytes;
    std::shared_ptr<Lease> lease;
    std::shared_ptr<Memory> memory;
};

TEST(writes_from_many_threads_land) {
    constexpr int kThreads = 3;
    constexpr std::size_t kChunk = 40'000;
    constexpr std::size_t kChunks = 24;
    for (const Pair& pair : all_pairs()) {
        const auto payload = test::pattern(kThreads * kChunks * kChunk, 5);
        const Arena arena(pair, payload.size());
        const auto target = arena.open(std::vector<std::int32_t>(kThreads, kChunks), 1);
        const auto lease = pair.source->add_lease(address_of(payload), payload.size(), nullptr);
        const auto descriptor = target->descriptor();
        std::vector<std::thread> threads;
        for (std::size_t thread = 0; thread < kThreads; ++thread) {
            threads.emplace_back([&, thread] {
                const auto remote = pair.source->connect(descriptor, Deadline::after(30));
                for (std::size_t i = 0; i < kChunks; i += 2) {
                    std::vector<Write> rows;
                    for (std::size_t chunk = i; chunk < i + 2; ++chunk) {
                        const std::uint64_t at = (thread * kChunks + chunk) * kChunk;
                        rows.push_back({address_of(payload) + at, at, kChunk,
                                        static_cast<std::int64_t>(thread << 8 | chunk)});
                    }
                    const auto operation = remote->post(rows);
                    operation->wait(Deadline::after(30));
                    CHECK(operation->is_done() && operation->error() == nullptr);
                }
            });
        }
        target->wait(std::vector<std::int32_t>{0, 1, 2}, Deadline::after(30));
        for (std::thread& thread : threads) {
            thread.join();
        }
        CHECK(std::equal(payload.begin(), payload.end(), arena.data()));
        CHECK(pair.source->counters()[static_cast<std::size_t>(Count::kBytesWritten)] ==
              payload.size());
        lease->release(Deadline::after(30));
    }
}

TEST(a_long_row_is_shared_between_threads) {
    for (const Pair& pair : all_pairs()) {
        const auto payload = test::pattern((9U << 20) + 11, 6);
        const Arena arena(pair, payload.size());
        const auto target = arena.open({1}, 1);
        const auto lease = pair.source->add_lease(address_of(payload), payload.size(), nullptr);
        const auto remote = pair.source->connect(target->descriptor(), Deadline::after(30));
        const std::vector<Write> rows{{address_of(payload), 0, payload.size(), 0}};
        remote->post(rows)->wait(Deadline::after(30));
        CHECK(target->poll(Deadline::after(30)) == std::vector<std::int64_t>{0});
        CHECK(std::equal(payload.begin(), payload.end(), arena.data()));
    }
}

TEST(fences_and_closes_race_with_writers) {
    constexpr int kRounds = 12;
    for (const Pair& pair : all_pairs()) {
        const auto payload = test::pattern(3U << 20, 7);
        const Arena arena(pair, payload.size());
        const auto lease = pair.source->add_lease(address_of(payload), payload.size(), nullptr);
        for (int round = 0; round < kRounds; ++round) {
            const auto target = arena.open({12}, static_cast<std::uint64_t>(round));
            const auto remote = pair.source->connect(target->descriptor(), Deadline::after(30));
            std::thread writer([&] {
                std::vector<Write> rows;
                for (std::uint64_t i = 0; i < 12; ++i) {
                    const std::uint64_t at = i << 18;
                    rows.push_back(
                        {address_of(payload) + at, at, 1U << 18, static_cast<std::int64_t>(i)});
                }
                try {
                    for (int i = 0; i < 20; ++i) {
                        remote->post(rows)->wait(Deadline::after(30));
                    }
                } catch (const Error& error) {
                    CHECK(error.scope() != Scope::kTimeout && error.scope() != Scope::kInternal);
                }
            });
            if (round % 3 == 0) {
                target->fence(round % 2 == 0);
                const std::vector<std::byte> before(arena.data(), arena.data() + payload.size());
                writer.join();
                CHECK(std::equal(before.begin(), before.end(), arena.data()));
                CHECK(scope_of([&] { target->wait({}, Deadline::never()); }) == Scope::kFenced);
            } else if (round % 3 == 1) {
                remote->close();
                writer.join();
            } else {
                target->close();
                writer.join();
            }
        }
        lease->release(Deadline::after(30));
    }
}

TEST(engines_close_under_load) {
    constexpr std::uint64_t kOperations = 8;
    for (const Pair& pair : all_pairs()) {
        const auto payload = test::pattern(4U << 20, 8);
        const Arena arena(pair, kOperations * payload.size());
        const auto target = arena.open({kOperations}, 1);
        const auto lease = pair.source->add_lease(address_of(payload), payload.size(), nullptr);
        const auto remote = pair.source->connect(target->descriptor(), Deadline::after(30));
        std::vector<std::shared_ptr<Operation>> operations;
        // Each to a place of its own: two writes to one would race, as they may on any fabric.
        const auto rows = [&](std::uint64_t i) {
            return std::vector<Write>{{address_of(payload), i * payload.size(), payload.size(),
                                       static_cast<std::int64_t>(i)}};
        };
        for (std::uint64_t i = 0; i < kOperations; ++i) {
            operations.push_back(remote->post(rows(i)));
        }
        pair.source->close();
        for (const auto& operation : operations) {
            CHECK(operation->is_done());
        }
        CHECK(scope_of([&] { [[maybe_unused]] const auto none = remote->post(rows(0)); }) ==
              Scope::kConfig);
        pair.sink->close();
    }
}

}  // namespace
}  // namespace weightsync
