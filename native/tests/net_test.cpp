// Meeting over the network: handshakes, refusals, frames.
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <thread>

#include "../src/net/channel.hpp"
#include "../src/net/dial.hpp"
#include "../src/net/listener.hpp"
#include "check.hpp"

namespace weightsync {
namespace {

using test::scope_of;

net::Patience soon() {
    return {Deadline::after(10)};
}

struct Door {
    explicit Door(const char* host = "127.0.0.1")
        : listener(context, reactor, {net::Address::parse(host, 0)}) {}
    ~Door() { reactor.stop(); }
    [[nodiscard]] std::uint64_t serve(std::uint64_t generation,
                                      const net::Listener::OnAccept& on_accept) {
        const std::uint64_t id = listener.next_target_id();
        listener.serve(id, key, generation, on_accept);
        return id;
    }
    [[nodiscard]] UniqueFd dial(std::uint64_t id, std::uint64_t generation, const net::Key& with) {
        net::Hello hello;
        hello.target_id = id;
        hello.generation = generation;
        hello.session = 42;
        return net::dial(listener.endpoints().front(), std::nullopt, hello, with, "peer", soon());
    }
    [[nodiscard]] std::uint64_t count(Count which) const {
        return context.counters.read()[static_cast<std::size_t>(which)];
    }
    EngineContext context;
    net::Reactor reactor{"ws-accept"};
    net::Listener listener;
    net::Key key = net::make_key();
};

void wait_for(const std::function<bool()>& ready) {
    const Deadline deadline = Deadline::after(20);
    while (!ready()) {
        CHECK(!deadline.passed());
        std::this_thread::yield();
    }
}

TEST(macs_are_those_of_the_standard) {
    // RFC 4231, test case 1, with its 20-byte key padded by zeros as HMAC itself does.
    net::Key key{};
    for (std::size_t i = 0; i < 20; ++i) {
        key[i] = std::byte{0x0b};
    }
    const std::array<char, 8> text{'H', 'i', ' ', 'T', 'h', 'e', 'r', 'e'};
    const auto all = std::as_bytes(std::span(text));
    const net::Mac mac = net::hmac_sha256(key, {all.first(3), all.subspan(3)});
    const std::array<unsigned, 4> head{0xb0, 0x34, 0x4c, 0x61};
    for (std::size_t i = 0; i < head.size(); ++i) {
        CHECK(std::to_integer<unsigned>(mac[i]) == head[i]);
    }
    net::Mac other = mac;
    other[31] ^= std::byte{1};
    CHECK(net::is_same(mac, mac) && !net::is_same(mac, other));
}

TEST(only_the_right_key_and_generation_get_in) {
    for (const char* host : {"127.0.0.1", "::1"}) {
        std::unique_ptr<Door> made;
        std::uint64_t id = 0;
        std::atomic<int> num_accepted{0};
        try {
            made = std::make_unique<Door>(host);
            id = made->serve(7, [&](net::Accepted accepted) {
                CHECK(accepted.hello.session == 42 && accepted.endpoint == 0);
                ++num_accepted;
            });
        } catch (const Error& error) {
            std::printf("  no %s here: %s\n", host, error.what());
            continue;
        }
        Door& door = *made;
        {
            const UniqueFd socket = door.dial(id, 7, door.key);
        }
        wait_for([&] { return num_accepted == 1; });
        wait_for([&] { return door.count(Count::kConnections) == 1; });
        CHECK(door.count(Count::kRefusedConnections) == 0);
        net::Key wrong = door.key;
        wrong[31] ^= std::byte{1};
        CHECK(scope_of([&] { auto fd = door.dial(id, 7, wrong); }) == Scope::kAuth);
        CHECK(door.count(Count::kRefusedConnections) == 1);
        CHECK(scope_of([&] { auto fd = door.dial(id, 6, door.key); }) == Scope::kFenced);
        CHECK(scope_of([&] { auto fd = door.dial(id + 1, 7, door.key); }) == Scope::kFenced);
        CHECK(door.count(Count::kRefusedConnections) == 3);
        door.listener.stop_serving(id);
        CHECK(scope_of([&] { auto fd = door.dial(id, 7, door.key); }) == Scope::kFenced);
        CHECK(num_accepted == 1);
    }
}

TEST(strangers_are_refused_and_counted) {
    Door door;
    const std::uint64_t id =
        door.serve(1, [](const net::Accepted&) { test::fail("net_test", 0, "let in"); });
    for (const std::size_t nbytes : {1UL, 55UL, 56UL, 88UL, 4000UL}) {
        const net::Address to = door.listener.endpoints().front();
        const UniqueFd socket(::socket(to.family(), SOCK_STREAM | SOCK_CLOEXEC, 0));
        CHECK(::connect(socket.get(), to.get(), to.length) == 0);
        const auto junk = test::pattern(nbytes, 3);
        CHECK(::send(socket.get(), junk.data(), junk.size(), MSG_NOSIGNAL) > 0);
        ::shutdown(socket.get(), SHUT_WR);
        std::array<std::byte, 128> answer;
        while (::recv(socket.get(), answer.data(), answer.size(), 0) > 0) {
        }
    }
    wait_for([&] { return door.count(Count::kRefusedConnections) == 5; });
    // A replay of an honest client's words fails: the nonce of the server is another.
    net::Hello hello;
    hello.target_id = id;
    hello.generation = 1;
    const net::Address to = door.listener.endpoints().front();
    const UniqueFd socket(::socket(to.family(), SOCK_STREAM | SOCK_CLOEXEC, 0));
    CHECK(::connect(socket.get(), to.get(), to.length) == 0);
    CHECK(::send(socket.get(), &hello, sizeof(hello), MSG_NOSIGNAL) == sizeof(hello));
    net::Challenge challenge;
    CHECK(::recv(socket.get(), &challenge, sizeof(challenge), MSG_WAITALL) == sizeof(challenge));
    CHECK(net::is_same(challenge.proof, net::prove(door.key, true, hello, challenge.nonce)));
    const net::Mac old = net::prove(door.key, false, hello, net::Nonce{});
    CHECK(::send(socket.get(), old.data(), old.size(), MSG_NOSIGNAL) == sizeof(old));
    net::Verdict verdict{};
    CHECK(::recv(socket.get(), &verdict, 1, MSG_WAITALL) == 1);
    CHECK(verdict == net::Verdict::kWrongKey);
    CHECK(door.count(Count::kConnections) == 0);
}

TEST(dialling_ends_by_type_when_nobody_answers) {
    const net::Address local = net::Address::parse("127.0.0.1", 0);
    const UniqueFd mute(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    CHECK(::bind(mute.get(), local.get(), local.length) == 0);
    const net::Address to = net::Address::of_socket(mute.get());
    const auto dial = [&](double seconds, const std::atomic<bool>* is_cancelled) {
        return scope_of([&] {
            auto fd = net::dial(to, local, {}, net::Key{}, "peer",
                                {Deadline::after(seconds), is_cancelled});
        });
    };
    CHECK(dial(10, nullptr) == Scope::kPeer);  // bound, but nobody listens
    CHECK(::listen(mute.get(), 4) == 0);
    CHECK(dial(0.05, nullptr) == Scope::kTimeout);
    const std::atomic<bool> is_cancelled{true};
    CHECK(dial(60, &is_cancelled) == Scope::kTransfer);
    for (const char* bad : {"", "localhost", "10.0.0", "10.0.0.256", "1.2.3.4x", "::g"}) {
        CHECK(scope_of([&] { [[maybe_unused]] const auto one = net::Address::parse(bad, 1); }) ==
              Scope::kConfig);
    }
    CHECK(net::Address::parse("::1", 80).text() == "[::1]:80");
    CHECK(net::Address::parse("127.0.0.9", 80).is_loopback());
    CHECK(!net::Address::parse("10.0.0.1", 80).is_loopback());
    CHECK(net::Address::parse("0.0.0.0", 80).is_any());
}

TEST(frames_arrive_whole_and_in_order) {
    std::array<int, 2> ends{};
    CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()) == 0);
    net::Channel sender{UniqueFd(ends[0])};
    net::Channel receiver{UniqueFd(ends[1])};
    constexpr std::size_t kFrames = 40;
    std::thread thread([&] {
        for (std::size_t i = 0; i < kFrames; ++i) {
            while (!sender.send(static_cast<std::uint8_t>(i),
                                test::pattern(i * 1600, static_cast<unsigned>(i)))) {
                std::this_thread::yield();  // a megabyte waits
            }
        }
        while (sender.flush() && !sender.is_idle()) {
            std::this_thread::yield();
        }
        sender.shut();
    });
    for (std::size_t i = 0; i < kFrames; ++i) {
        const net::Frame frame = receiver.next(soon(), "peer");
        CHECK(frame.type == i);
        CHECK(frame.payload == test::pattern(i * 1600, static_cast<unsigned>(i)));
    }
    CHECK(scope_of([&] { auto none = receiver.next(soon(), "peer"); }) == Scope::kPeer);
    thread.join();
}

TEST(nonsense_frames_end_a_channel) {
    for (const std::uint32_t length : {0U, 70'000U, 0xffffffffU}) {
        std::array<int, 2> ends{};
        CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()) ==
              0);
        const UniqueFd stranger(ends[0]);
        net::Channel receiver{UniqueFd(ends[1])};
        CHECK(::send(stranger.get(), &length, sizeof(length), 0) == sizeof(length));
        CHECK(!receiver.receive([](const net::Frame&) { CHECK(false); }));
    }
}

TEST(unwatching_waits_for_a_handler_that_runs) {
    net::Reactor reactor("ws-test");
    for (int round = 0; round < 200; ++round) {
        const EventFd event;
        auto value = std::make_unique<int>(0);
        std::atomic<bool> has_run{false};
        const std::uint64_t id = reactor.watch(event.get(), EPOLLIN, [&](std::uint32_t) {
            ++*value;
            has_run = true;
            return round % 2 == 0;  // and again
        });
        event.signal();
        wait_for([&] { return has_run.load(); });
        reactor.unwatch(id);
        value.reset();  // ASAN and TSAN watch
    }
    const net::Timer timer;
    std::atomic<int> num_rings{0};
    const std::uint64_t id = reactor.watch(timer.get(), EPOLLIN, [&](std::uint32_t) {
        timer.drain();
        ++num_rings;
        return false;
    });
    timer.set(std::chrono::milliseconds(5));
    wait_for([&] { return num_rings == 1; });
    timer.set(std::chrono::hours(1));
    timer.clear();
    reactor.unwatch(id);
}

}  // namespace
}  // namespace weightsync
