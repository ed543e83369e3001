// What a NIC or its library can refuse or break, one after the other.
#include "verbs_link.hpp"

namespace weightsync {
namespace {

using namespace verbs;
using namespace test;

// 64 chunks over one rail: a typed error; over two: all bytes, over the other one.
void check_failure(int num_devices, const std::function<void(FakeVerbs&)>& plant) {
    FakeVerbs fake(num_devices);
    {
        Wired link(fake, 1U << 16, {64});
        plant(fake);
        const auto operation = link.remote->post(link.rows(64));
        CHECK(scope_of([&] { operation->wait(Deadline::after(kWaitS)); }) == Scope::kRail);
    }
    {
        Wired link(fake, 1U << 16, {64}, {"fake0", "fake2"}, {"fake1", "fake3"});
        plant(fake);
        link.remote->post(link.rows(64))->wait(Deadline::after(kWaitS));
        link.target->wait(kFirst, Deadline::after(kWaitS));
        CHECK(link.arena == link.payload);
    }
    check_rules(fake);
}

// Every status that a completion can have: with one rail the operation fails with a typed error,
// with two it goes on over the other one; whether the bytes had landed or not.
TEST(verbs_every_status_is_handled) {
    if (!can_meet()) {
        return;
    }
    for (int status = IBV_WC_LOC_LEN_ERR; status < kNumStatuses; ++status) {
        for (const bool has_landed : {false, true}) {
            FakeVerbs fake(4);
            {
                Wired link(fake, 1U << 16, {64});
                fake.fail_write(0, static_cast<ibv_wc_status>(status), 20, has_landed);
                const auto operation = link.remote->post(link.rows(64));
                CHECK(scope_of([&] { operation->wait(Deadline::after(kWaitS)); }) == Scope::kRail);
            }
            {
                Wired link(fake, 1U << 16, {64}, {"fake0", "fake2"}, {"fake1", "fake3"});
                fake.fail_write(0, static_cast<ibv_wc_status>(status), 3, has_landed);
                link.remote->post(link.rows(64))->wait(Deadline::after(kWaitS));
                link.target->wait(kFirst, Deadline::after(kWaitS));
                CHECK(link.arena == link.payload);
            }
            check_rules(fake);
        }
    }
}

TEST(verbs_a_device_short_of_memory_is_asked_again) {
    if (!can_meet()) {
        return;
    }
    FakeVerbs fake(2);
    {
        Wired link(fake, 1U << 16, {64});
        for (const int taken : {0, 1, 5}) {
            fake.refuse_posts(0, ENOMEM, 3, taken);
            std::ranges::fill(link.arena, std::byte{0});
            link.remote->post(link.rows(64))->wait(Deadline::after(kWaitS));
            link.target->wait(kFirst, Deadline::after(kWaitS));
            CHECK(link.arena == link.payload);
            link.target->reset(kFirst);
        }
        fake.refuse_posts(0, EINVAL, 1, 2);
        const auto operation = link.remote->post(link.rows(64));
        CHECK(scope_of([&] { operation->wait(Deadline::after(kWaitS)); }) == Scope::kRail);
    }
    check_rules(fake);
}

TEST(verbs_every_status_of_an_arrival_is_handled) {
    if (!can_meet()) {
        return;
    }
    for (int status = IBV_WC_LOC_LEN_ERR; status < kNumStatuses; ++status) {
        check_failure(4, [&](FakeVerbs& fake) {
            fake.fail_arrival(1, static_cast<ibv_wc_status>(status), 3);
        });
    }
}

// The sink tells how much more fits by small messages of its own. One that fails, or receives that
// cannot be posted, leave the source without credits and without an error.
TEST(verbs_a_sink_that_cannot_go_on_says_so) {
    if (!can_meet()) {
        return;
    }
    const auto check = [](const std::function<void(FakeVerbs&)>& plant) {
        FakeVerbs fake(4);
        {
            Wired link(fake, 1U << 16, {2048});
            plant(fake);
            const auto operation = link.remote->post(link.rows(2048));
            CHECK(scope_of([&] { operation->wait(Deadline::after(kWaitS)); }) == Scope::kRail);
        }
        {
            Wired link(fake, 1U << 16, {2048}, {"fake0", "fake2"}, {"fake1", "fake3"});
            plant(fake);
            link.remote->post(link.rows(2048))->wait(Deadline::after(kWaitS));
            link.target->wait(kFirst, Deadline::after(kWaitS));
            CHECK(link.arena == link.payload);
        }
        check_rules(fake);
    };
    check([](FakeVerbs& fake) { fake.fail_message(1, IBV_WC_RETRY_EXC_ERR); });
    check([](FakeVerbs& fake) { fake.refuse_messages(1, ENOMEM); });
    check([](FakeVerbs& fake) { fake.refuse_receives(1, ENOMEM); });
}

TEST(verbs_a_device_or_queue_that_fails_is_given_up) {
    if (!can_meet()) {
        return;
    }
    const auto check = [](const std::function<void(FakeVerbs&, int)>& plant) {
        for (const int device : {0, 1}) {
            FakeVerbs fake(4);
            Wired link(fake, 8U << 20, {256}, {"fake0", "fake2"}, {"fake1", "fake3"});
            fake.hold_writes(0, true);
            const auto operation = link.remote->post(link.rows(256));
            plant(fake, device);
            operation->wait(Deadline::after(kWaitS));
            link.target->wait(kFirst, Deadline::after(kWaitS));
            CHECK(link.arena == link.payload);
            fake.hold_writes(0, false);
        }
    };
    check([](FakeVerbs& fake, int device) { fake.raise(device, IBV_EVENT_DEVICE_FATAL); });
    check([](FakeVerbs& fake, int device) { fake.raise(device, IBV_EVENT_CQ_ERR); });
    check([](FakeVerbs& fake, int device) {
        fake.fail_polls(device, true);
        fake.raise(device, IBV_EVENT_COMM_EST);  // wakes the thread
    });
}

TEST(verbs_states_that_a_queue_pair_does_not_reach) {
    if (!can_meet()) {
        return;
    }
    FakeVerbs fake(2);
    {
        Wired link(fake, 1U << 16, {64});
        const auto connect = [&] {
            [[maybe_unused]] const auto remote =
                link.source->connect(link.target->descriptor(), Deadline::after(kWaitS));
        };
        fake.fail_modify_qp(IBV_QPS_INIT, 1);
        CHECK(scope_of(connect) == Scope::kRail);
        for (const ibv_qp_state state : {IBV_QPS_RTR, IBV_QPS_RTS}) {
            fake.fail_modify_qp(state, 1);  // at the sink, which is first
            CHECK(scope_of(connect) == Scope::kQueuePair);
        }
        fake.refuse_receives(0, ENOMEM);
        CHECK(scope_of(connect) == Scope::kQueuePair);
        fake.refuse_receives(1, ENOMEM);
        CHECK(scope_of(connect) == Scope::kQueuePair);
        connect();
        // The fence then is that the queue pair is destroyed, and the memory's key with it.
        set_reporter([](const char*) noexcept {});
        fake.hold_writes(0, true);
        const auto operation = link.remote->post(link.rows(64));
        fake.fail_modify_qp(IBV_QPS_RESET, 1);
        link.target->fence(false);
        const std::vector<std::byte> before = link.arena;
        fake.hold_writes(0, false);
        CHECK(scope_of([&] { operation->wait(Deadline::after(kWaitS)); }) == Scope::kFenced);
        CHECK(link.arena == before);
    }
    set_reporter(nullptr);
    check_rules(fake);
}

}  // namespace
}  // namespace weightsync
