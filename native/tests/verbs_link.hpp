// A source and a sink over fake NICs, for the tests of the verbs fabric.
#pragma once

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "../src/fabrics/verbs/verbs.hpp"
#include "../src/net/hmac.hpp"
#include "check.hpp"
#include "fake_verbs.hpp"

namespace weightsync::test {

inline constexpr double kWaitS = 20;

inline bool can_meet() {
    const char* problem = net::libcrypto_problem();
    if (problem != nullptr) {
        std::printf("  skipped: %s\n", problem);
    }
    return problem == nullptr;
}

inline std::shared_ptr<Engine> open_engine(const FakeVerbs& fake, const char* name,
                                           std::vector<std::string> devices,
                                           const verbs::MemoryOptions& memory = {}) {
    return Engine::open(name, [&](EngineContext& context) {
        VerbsOptions options;
        options.devices = std::move(devices);
        options.memory = memory;
        options.table = &fake.table();
        options.sysfs = fake.sysfs();
        return make_verbs_fabric(context, options);
    });
}

// A source and a sink with a target that is as long as the payload.
struct Wired {
    Wired(const FakeVerbs& fake, std::size_t nbytes, std::vector<std::int32_t> chunks,
          std::vector<std::string> source_devices = {"fake0"},
          std::vector<std::string> sink_devices = {"fake1"},
          const verbs::MemoryOptions& memory = {})
        : source(open_engine(fake, "source", std::move(source_devices), memory)),
          sink(open_engine(fake, "sink", std::move(sink_devices), memory)),
          payload(pattern(nbytes, 11)),
          arena(nbytes) {
        source_lease = source->add_lease(address_of(payload), nbytes, nullptr);
        sink_lease = sink->add_lease(address_of(arena), nbytes, nullptr);
        open_target(std::move(chunks), 1);
    }
    void open_target(std::vector<std::int32_t> chunks, std::uint64_t generation) {
        RangeRequest range;
        range.nbytes = arena.size();
        range.lease = sink_lease->state();
        target = sink->export_target({range}, chunks, 12, generation);
        remote = source->connect(target->descriptor(), Deadline::after(kWaitS));
    }
    // Chunks of equal length, one row each.
    [[nodiscard]] std::vector<Write> rows(std::int64_t chunks) const {
        const std::uint64_t each = payload.size() / static_cast<std::uint64_t>(chunks);
        std::vector<Write> result;
        for (std::int64_t i = 0; i < chunks; ++i) {
            const std::uint64_t at = static_cast<std::uint64_t>(i) * each;
            result.push_back({address_of(payload) + at, at, each, i});
        }
        return result;
    }
    std::shared_ptr<Engine> source;
    std::shared_ptr<Engine> sink;
    std::vector<std::byte> payload;
    std::vector<std::byte> arena;
    std::shared_ptr<Lease> source_lease;
    std::shared_ptr<Lease> sink_lease;
    std::shared_ptr<Target> target;
    std::shared_ptr<Remote> remote;
};

inline const std::vector<std::int32_t> kFirst{0};

inline void check_rules(FakeVerbs& fake) {
    CHECK(fake.counts().full_send_queues == 0);
    CHECK(fake.counts().full_completion_queues == 0);
    CHECK(fake.counts().missing_receives == 0);
}

}  // namespace weightsync::test
