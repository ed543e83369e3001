// Processes of one host: rendezvous over an abstract unix socket, bytes over memory.
#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <fstream>
#include <thread>

#include "listener.hpp"
#include "local.hpp"
#include "remote.hpp"

namespace weightsync::local {

namespace {

// Yama's mode 1 lets only ancestors attach; any other mode either needs nothing or cannot be
// helped from here (the probe of the handshake says so).
void allow_attach_if_restricted() {
    std::ifstream file("/proc/sys/kernel/yama/ptrace_scope");
    int scope = 0;
    if (file >> scope && scope == 1) {
        ::prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
    }
}

UniqueFd connect_socket(const Descriptor& descriptor, const std::string& label,
                        const Deadline& deadline) {
    UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    if (!socket) {
        throw os_error(Scope::kMemory, "socket", errno, "check `ulimit -n`");
    }
    // With a full backlog connect() would block for ever: cut it into slices.
    const timeval slice{0, std::chrono::microseconds(kSlice).count()};
    ::setsockopt(socket.get(), SOL_SOCKET, SO_SNDTIMEO, &slice, sizeof(slice));
    const auto [address, length] = abstract_address(descriptor.socket_name);
    while (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0) {
        const int error = errno;
        if (error == ECONNREFUSED) {
            throw Error(Scope::kPeer,
                        label +
                            " does not listen: it has ended, or runs in another network "
                            "namespace; plan again without it",
                        {{"peer", label}});
        }
        if (error != EAGAIN && error != EINTR) {
            throw os_error(Scope::kTransfer, "connect", error, "");
        }
        if (deadline.passed()) {
            throw Error(Scope::kTimeout, label + " did not accept a connection; is it stopped?",
                        {{"peer", label}});
        }
        check_interrupt();
    }
    if (peer_of(socket.get()).uid != ::geteuid()) {
        throw Error(Scope::kAuth, label + " runs as another user", {{"peer", label}});
    }
    return socket;
}

std::vector<UniqueFd> await_reply(int socket, const std::string& label, const Deadline& deadline) {
    std::vector<UniqueFd> fds;
    Reply reply;
    for (;;) {
        pollfd poll_fd{socket, POLLIN, 0};
        const auto slice = std::chrono::ceil<std::chrono::milliseconds>(deadline.remaining(kSlice));
        ::poll(&poll_fd, 1, static_cast<int>(slice.count()));
        const auto got = receive_message(socket, bytes_of(reply), fds);
        if (got && *got == 0) {
            throw Error(Scope::kPeer, label + " hung up while connecting", {{"peer", label}});
        }
        if (got &&
            (*got != sizeof(Reply) || reply.magic != kMagic || reply.version != kWireVersion)) {
            throw Error(Scope::kConfig, label + " speaks another version of weightsync");
        }
        if (got && reply.scope >= 0) {
            reply.message.back() = '\0';
            const auto scope =
                reply.scope < kNumScopes ? static_cast<Scope>(reply.scope) : Scope::kTransfer;
            throw Error(scope, label + " refused: " + reply.message.data(), {{"peer", label}});
        }
        if (got) {
            return fds;
        }
        if (deadline.passed()) {
            throw Error(Scope::kTimeout, label + " did not answer; is it stopped?",
                        {{"peer", label}});
        }
        check_interrupt();
    }
}

class LocalFabric final : public Fabric {
  public:
    LocalFabric(EngineContext& context, std::string name, int num_threads,
                std::unique_ptr<PullMemory> memory)
        : context_(context),
          name_(std::move(name)),
          memory_(std::move(memory)),
          pool_(num_threads) {}
    ~LocalFabric() override { stop(); }

    [[nodiscard]] std::string_view name() const noexcept override { return name_; }

    [[nodiscard]] std::shared_ptr<TargetPort> export_target(TargetSpec spec) override {
        const std::shared_ptr<Listener> listener = open_listener();
        Descriptor descriptor;
        const bool is_shared = memory_->can_push() &&
                               std::ranges::all_of(spec.exported, [](const ExportedRange& range) {
                                   return range.block != nullptr;
                               });
        descriptor.mode = is_shared ? Mode::kPush : Mode::kPull;
        descriptor.pid = static_cast<std::uint32_t>(::getpid());
        descriptor.target_id = listener->next_target_id();
        descriptor.generation = spec.generation;
        fill_random(descriptor.key);
        descriptor.socket_name = listener->name();
        const std::shared_ptr<LocalTarget> target =
            is_shared ? make_push_target(context_, reactor_, std::move(descriptor), std::move(spec))
                      : make_pull_target(context_, reactor_, pool_, *memory_, std::move(descriptor),
                                         std::move(spec));
        listener->add(target);
        return target;
    }

    [[nodiscard]] std::shared_ptr<RemotePort> connect(std::span<const std::byte> bytes,
                                                      const Deadline& deadline) override {
        const Descriptor descriptor = Descriptor::decode(bytes);
        Peer peer;
        peer.label = name_ + " pid " + std::to_string(descriptor.pid);
        peer.socket = connect_socket(descriptor, peer.label, deadline);
        peer.pidfd = open_peer_pidfd(peer.socket.get(), peer_of(peer.socket.get()).pid);
        if (descriptor.mode == Mode::kPull) {
            allow_attach_if_restricted();
            memory_->follow(context_.leases);
        }
        Request request;
        request.target_id = descriptor.target_id;
        request.generation = descriptor.generation;
        request.key = descriptor.key;
        request.probe_value = random_u64();
        const std::uint64_t probe = request.probe_value;
        request.probe_address = reinterpret_cast<std::uint64_t>(&probe);
        EventFd completion;
        const std::array<int, 1> request_fds{completion.get()};
        send_message(peer.socket.get(), bytes_of(request), request_fds);
        std::vector<UniqueFd> fds = await_reply(peer.socket.get(), peer.label, deadline);
        const std::shared_ptr<LocalRemote> remote =
            descriptor.mode == Mode::kPush
                ? make_push_remote(context_, reactor_, pool_, std::move(peer), std::move(fds))
                : make_pull_remote(context_, reactor_, pool_, *memory_, std::move(peer),
                                   std::move(completion), std::move(fds));
        remote->start();
        return remote;
    }

    void stop() noexcept override {
        pool_.stop();
        reactor_.stop();
        memory_->unfollow(context_.leases);
    }

  private:
    [[nodiscard]] std::shared_ptr<Listener> open_listener() {
        const std::lock_guard lock(mutex_);
        if (!listener_) {
            listener_ = std::make_shared<Listener>(context_, reactor_);
            listener_->start();
        }
        return listener_;
    }

    EngineContext& context_;
    const std::string name_;
    const std::unique_ptr<PullMemory> memory_;
    // Last to go: ports that queued jobs and handlers hold look at it in their destructors.
    net::Reactor reactor_{"ws-local"};
    CopyPool pool_;
    std::mutex mutex_;
    std::shared_ptr<Listener> listener_;
};

}  // namespace

std::unique_ptr<Fabric> make_fabric(EngineContext& context, std::string name,
                                    const LocalOptions& options,
                                    std::unique_ptr<PullMemory> memory) {
    constexpr int kMaxThreads = 64;
    if (options.num_threads < 0 || options.num_threads > kMaxThreads) {
        throw Error(Scope::kConfig, std::to_string(options.num_threads) +
                                        " copying threads; give 1 .. " +
                                        std::to_string(kMaxThreads));
    }
    // Two threads saturate the memory of small machines and leave cores to the framework.
    const int automatic = std::thread::hardware_concurrency() >= 2 ? 2 : 1;
    return std::make_unique<LocalFabric>(context, std::move(name),
                                         options.num_threads == 0 ? automatic : options.num_threads,
                                         std::move(memory));
}

}  // namespace weightsync::local

namespace weightsync {

std::unique_ptr<Fabric> make_local_fabric(EngineContext& context, const LocalOptions& options) {
    return local::make_fabric(context, "local", options, local::make_host_memory());
}

}  // namespace weightsync
