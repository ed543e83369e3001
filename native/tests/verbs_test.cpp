// The verbs fabric over NICs that fail on request.
#include <algorithm>
#include <cstring>
#include <set>
#include <thread>

#include "verbs_link.hpp"

namespace weightsync {
namespace {

using namespace verbs;
using namespace test;

TEST(verbs_discovery_reads_sysfs) {
    const FakeVerbs fake(2);
    const auto ports = list_ports(fake.sysfs());
    CHECK(ports.size() == 2);
    CHECK(ports[1].device == "fake1" && ports[1].port == 1 && ports[1].is_active);
    CHECK(ports[0].gbit_per_s == 100 && ports[0].link_layer == "Ethernet");
    const GidEntry* gid = choose_gid(ports[0]);
    CHECK(gid != nullptr && gid->index == 1 && gid_text(*gid) == "10.0.0.1");
    CHECK(list_ports("/nonexistent").empty());
}

TEST(verbs_gids_are_chosen_by_rank) {
    const auto entry = [](int index, std::uint8_t first, std::uint8_t second, GidType type) {
        GidEntry made;
        made.index = index;
        made.gid[0] = first;
        made.gid[1] = second;
        made.type = type;
        return made;
    };
    PortFacts port;
    CHECK(choose_gid(port) == nullptr);
    port.gids.push_back(entry(0, 0x20, 1, GidType::kRoceV1));
    CHECK(choose_gid(port) == nullptr);
    port.gids.push_back(entry(1, 0xFE, 0x80, GidType::kRoceV2));
    CHECK(choose_gid(port)->index == 1);
    port.gids.push_back(entry(2, 0x20, 1, GidType::kRoceV2));
    CHECK(choose_gid(port)->index == 2);
    port.gids.push_back(entry(3, 0, 0, GidType::kRoceV2));
    port.gids.back().gid[10] = port.gids.back().gid[11] = 0xFF;
    CHECK(choose_gid(port)->index == 3);
    PortFacts infiniband;
    infiniband.gids.push_back(entry(0, 0xFE, 0x80, GidType::kInfiniBand));
    CHECK(choose_gid(infiniband)->index == 0);
}

TEST(verbs_bad_options_are_refused) {
    const FakeVerbs fake(1);
    const auto open = [&](const std::function<void(VerbsOptions&)>& change) {
        return [&fake, change] {
            VerbsOptions options;
            options.table = &fake.table();
            options.sysfs = fake.sysfs();
            change(options);
            [[maybe_unused]] const auto engine = Engine::open(
                "bad", [&](EngineContext& context) { return make_verbs_fabric(context, options); });
        };
    };
    CHECK(scope_of(open([](auto& o) { o.devices = {"mlx5_0"}; })) == Scope::kConfig);
    CHECK(scope_of(open([](auto& o) { o.devices = {"fake0", "fake0:1"}; })) == Scope::kConfig);
    CHECK(scope_of(open([](auto& o) { o.path.gid_index = 99; })) == Scope::kConfig);
    CHECK(scope_of(open([](auto& o) { o.path.pkey = 0x1234; })) == Scope::kConfig);
    CHECK(scope_of(open([](auto& o) { o.path.mtu_bytes = 1500; })) == Scope::kConfig);
    CHECK(scope_of(open([](auto& o) { o.sysfs = "/nonexistent"; })) == Scope::kConfig);
    CHECK(scope_of(open([](auto& o) { o.addresses = {"not an address"}; })) == Scope::kConfig);
}

TEST(verbs_parents_outlive_children) {
    const FakeVerbs fake(1);
    const std::int64_t before = live_count(Kind::kVerbs);
    std::unique_ptr<Registration> registration;
    std::vector<std::byte> memory(4096);
    {
        auto context = std::make_shared<Context>(fake.table(), "fake0");
        auto domain = std::make_shared<ProtectionDomain>(std::move(context));
        registration = std::make_unique<Registration>(std::move(domain), address_of(memory), 4096,
                                                      Registration::Access::kReadLocally);
    }
    CHECK(live_count(Kind::kVerbs) == before + 3);
    registration.reset();
    CHECK(live_count(Kind::kVerbs) == before);
}

TEST(verbs_writes_of_many_sizes_land) {
    if (!can_meet()) {
        return;
    }
    FakeVerbs fake(2);
    {
        // Longer than a piece, so that it is cut; and a doorbell serves a whole chain.
        Wired link(fake, 5U << 20, {1, 1000});
        link.remote->post(std::vector<Write>{{address_of(link.payload), 0, link.payload.size(), 0}})
            ->wait(Deadline::after(kWaitS));
        link.target->wait(kFirst, Deadline::after(kWaitS));
        CHECK(link.arena == link.payload);
        std::ranges::fill(link.arena, std::byte{0});
        const int doorbells = fake.counts().doorbells;
        std::vector<Write> rows = link.rows(1000);
        for (Write& row : rows) {
            row.immediate += 1 << 12;
        }
        rows.push_back({0, 0, 0, 1 << 12});  // no bytes, but an arrival: a second one
        link.remote->post(rows)->wait(Deadline::after(kWaitS));
        link.target->wait(std::vector<std::int32_t>{1}, Deadline::after(kWaitS));
        const std::size_t covered = link.payload.size() / 1000 * 1000;
        CHECK(std::memcmp(link.arena.data(), link.payload.data(), covered) == 0);
        CHECK(fake.counts().doorbells - doorbells < 200);
    }
    check_rules(fake);
}

TEST(verbs_credits_hold_with_short_queues) {
    if (!can_meet()) {
        return;
    }
    for (const int depth : {16, 64, 1000}) {
        FakeLimits limits;
        limits.max_qp_wr = depth;
        limits.max_cqe = 4 * depth;  // several connections need several completion queues
        FakeVerbs fake(2, limits);
        {
            Wired link(fake, 4096 * 16, {4000});
            std::vector<std::shared_ptr<Remote>> remotes;
            for (int i = 0; i < 5; ++i) {
                remotes.push_back(
                    link.source->connect(link.target->descriptor(), Deadline::after(kWaitS)));
            }
            std::vector<std::shared_ptr<Operation>> operations;
            for (std::int64_t i = 0; i < 4000; ++i) {
                const Write row{address_of(link.payload), 0, 16, i};
                operations.push_back(remotes[static_cast<std::size_t>(i) % remotes.size()]->post(
                    std::span(&row, 1)));
            }
            for (const auto& operation : operations) {
                operation->wait(Deadline::after(kWaitS));
            }
            link.target->wait(kFirst, Deadline::after(kWaitS));
        }
        check_rules(fake);
    }
}

TEST(verbs_a_port_that_goes_down_leaves_its_writes_to_the_others) {
    if (!can_meet()) {
        return;
    }
    FakeVerbs fake(5);
    {
        // Two rails against three.
        Wired link(fake, 8U << 20, {256}, {"fake0", "fake1"}, {"fake2", "fake3", "fake4"});
        fake.hold_writes(0, true);
        const auto operation = link.remote->post(link.rows(256));
        fake.set_port(0, false);
        operation->wait(Deadline::after(kWaitS));
        link.target->wait(kFirst, Deadline::after(kWaitS));
        CHECK(link.arena == link.payload);
        // And it is used again when it is back.
        fake.hold_writes(0, false);
        fake.set_port(0, true);
        std::ranges::fill(link.arena, std::byte{0});
        link.target->reset(kFirst);
        link.remote->post(link.rows(256))->wait(Deadline::after(kWaitS));
        link.target->wait(kFirst, Deadline::after(kWaitS));
        CHECK(link.arena == link.payload);
    }
    check_rules(fake);
}

TEST(verbs_the_sinks_port_may_go_down_too) {
    if (!can_meet()) {
        return;
    }
    FakeVerbs fake(4);
    {
        Wired link(fake, 8U << 20, {256}, {"fake0", "fake1"}, {"fake2", "fake3"});
        fake.hold_writes(1, true);  // the source sees nothing of it by itself
        const auto operation = link.remote->post(link.rows(256));
        fake.set_port(3, false);
        operation->wait(Deadline::after(kWaitS));
        link.target->wait(kFirst, Deadline::after(kWaitS));
        CHECK(link.arena == link.payload);
    }
    check_rules(fake);
}

TEST(verbs_a_fence_stops_writes_that_were_posted) {
    if (!can_meet()) {
        return;
    }
    FakeVerbs fake(2);
    {
        Wired link(fake, 1U << 16, {64});
        fake.hold_writes(0, true);
        const auto operation = link.remote->post(link.rows(64));
        link.target->fence(false);
        const std::vector<std::byte> before = link.arena;
        fake.hold_writes(0, false);
        CHECK(scope_of([&] { operation->wait(Deadline::after(kWaitS)); }) == Scope::kFenced);
        CHECK(link.arena == before);
        CHECK(scope_of([&] { link.remote->post(link.rows(64))->wait(Deadline::after(kWaitS)); }) ==
              Scope::kFenced);
        link.open_target({64}, 2);
        link.remote->post(link.rows(64))->wait(Deadline::after(kWaitS));
        link.target->wait(kFirst, Deadline::after(kWaitS));
        CHECK(link.arena == link.payload);
    }
    check_rules(fake);
}

TEST(verbs_a_peer_that_goes_away_fails_operations) {
    if (!can_meet()) {
        return;
    }
    FakeVerbs fake(2);
    {
        Wired link(fake, 1U << 16, {64});
        fake.hold_writes(0, true);
        const auto operation = link.remote->post(link.rows(64));
        link.sink_lease.reset();
        link.target.reset();
        link.sink->close();
        link.sink.reset();
        // A target that is closed says goodbye, as a fenced one does.
        CHECK(scope_of([&] { operation->wait(Deadline::after(kWaitS)); }) == Scope::kFenced);
        fake.hold_writes(0, false);
    }
    check_rules(fake);
}

TEST(verbs_closing_ends_what_is_held) {
    if (!can_meet()) {
        return;
    }
    FakeVerbs fake(2);
    {
        Wired link(fake, 1U << 16, {64});
        fake.hold_writes(0, true);
        const auto operation = link.remote->post(link.rows(64));
        link.remote->close();
        CHECK(scope_of([&] { operation->wait(Deadline::after(kWaitS)); }) == Scope::kTransfer);
        link.source_lease->release(Deadline::after(1));  // quiescent
    }
    check_rules(fake);
}

TEST(verbs_failures_while_connecting_leave_nothing) {
    if (!can_meet()) {
        return;
    }
    FakeVerbs fake(2);
    {
        Wired link(fake, 4096, {1});
        const auto connect = [&] {
            [[maybe_unused]] const auto remote =
                link.source->connect(link.target->descriptor(), Deadline::after(kWaitS));
        };
        fake.fail_create_qp(1);  // at the source
        CHECK(scope_of(connect) == Scope::kRail);
        std::vector<std::byte> more(4096);
        fake.fail_reg_mr(2, ENOMEM);
        CHECK(scope_of([&] {
                  [[maybe_unused]] const auto lease =
                      link.source->add_lease(address_of(more), more.size(), nullptr);
              }) == Scope::kMemory);
        connect();
    }
    check_rules(fake);
}

std::atomic<int> num_reports{0};

TEST(verbs_what_cannot_be_destroyed_is_reported_and_counted) {
    FakeVerbs fake(1);
    set_reporter([](const char*) noexcept { ++num_reports; });
    const std::int64_t before = live_count(Kind::kVerbs);
    {
        auto context = std::make_shared<Context>(fake.table(), "fake0");
        const Port port = open_port(*context, list_ports(fake.sysfs())[0], {});
        auto domain = std::make_shared<ProtectionDomain>(context);
        auto channel = std::make_shared<CompletionChannel>(context);
        auto queue = std::make_shared<CompletionQueue>(channel, 64);
        auto pair = std::make_unique<QueuePair>(domain, queue, port, QueueSizes{8, 8});
        CHECK(queue->reserved() == 16);
        fake.fail_destroy_qp(1);
        pair.reset();
        CHECK(queue->reserved() == 16);  // its completions may still come
    }
    set_reporter(nullptr);
    CHECK(num_reports == 1);
    CHECK(live_count(Kind::kVerbs) == before + 1);
    count_live(Kind::kVerbs, -1);  // the planted leak
}

}  // namespace
}  // namespace weightsync
