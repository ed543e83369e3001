#include <weightsync/codec.hpp>
#include <weightsync/engine.hpp>

#include <unistd.h>

#include <algorithm>
#include <utility>

namespace weightsync {

namespace {

[[noreturn]] void throw_in_child() {
    throw Error(Scope::kConfig,
                "this engine was opened before the process forked; open another one here");
}

}  // namespace

Memory::Memory(EngineContext& context, std::uint64_t nbytes, bool prefault)
    : context_(context), block_(std::make_shared<Block>(nbytes, prefault)) {
    const auto address = reinterpret_cast<std::uint64_t>(block_->data());
    lease_ = context_.leases.add(address, nbytes, block_);
}

Memory::~Memory() {
    if (!context_.is_in_child()) {
        context_.leases.abandon(lease_);
    }
}

Lease::~Lease() {
    if (!context_.is_in_child()) {
        context_.leases.abandon(state_);
    }
}

void Lease::release(const Deadline& deadline) {
    if (context_.is_in_child()) {
        throw_in_child();
    }
    Fabric& fabric = *context_.fabric;
    context_.leases.release(
        state_, deadline,
        [&fabric](WakeWord& word, const std::function<bool()>& ready, const Deadline& end) {
            return fabric.wait(word, ready, end);
        });
}

Remote::Remote(EngineContext& context, std::shared_ptr<RemotePort> port)
    : context_(context), port_(std::move(port)) {}

Remote::~Remote() {
    close();
    if (context_.is_in_child()) {
        keep_for_ever(std::move(port_));
    }
}

std::uint64_t Remote::mapped_address() const noexcept {
    return is_open_.load() ? port_->mapped_address() : 0;
}

std::vector<LeaseState*> Remote::prepare(std::span<const Write> rows) const {
    const RemoteInfo& remote = info();
    if (context_.is_in_child()) {
        throw_in_child();
    }
    if (!is_open_.load()) {
        throw Error(Scope::kConfig, "the remote to " + remote.peer + " is closed",
                    {{"peer", remote.peer}});
    }
    remote.ranges.check(rows, remote.peer);
    return context_.leases.pin(rows);
}

std::shared_ptr<Operation> Remote::start(std::vector<Write> rows, std::vector<LeaseState*> pins) {
    auto operation =
        std::make_shared<Operation>(context_, port_->info(), std::move(rows), std::move(pins));
    context_.counters.add(Count::kOperations);
    port_->info()->counters.add(Count::kOperations);
    port_->post(operation);
    return operation;
}

std::shared_ptr<Operation> Remote::post(std::span<const Write> rows) {
    // The copy is checked, not the caller's table: another thread may still write that one.
    std::vector<Write> own(rows.begin(), rows.end());
    std::vector<LeaseState*> pins = prepare(own);
    return start(std::move(own), std::move(pins));
}

std::shared_ptr<Operation> Remote::write_paged(const PagedWrite& pages) {
    std::vector<Write> rows = expand_pages(pages, info().chunk_bits);
    std::vector<LeaseState*> pins = prepare(rows);
    return start(std::move(rows), std::move(pins));
}

void Remote::notify(std::span<const std::int32_t> immediates, std::uint64_t nbytes) {
    const RemoteInfo& remote = info();
    if (mapped_address() == 0) {
        throw Error(Scope::kConfig,
                    "no memory of " + remote.peer +
                        " is mapped here, so there is nothing to announce; post writes instead",
                    {{"peer", remote.peer}});
    }
    if (std::ranges::any_of(immediates, [](std::int32_t immediate) { return immediate < 0; })) {
        throw Error(Scope::kConfig, "immediates must not be negative", {{"peer", remote.peer}});
    }
    port_->notify(immediates);
    for (Counters* counters : {&context_.counters, &port_->info()->counters}) {
        counters->add(Count::kNotifies, immediates.size());
        counters->add(Count::kBytesWritten, nbytes);
    }
}

void Remote::close() noexcept {
    if (is_open_.exchange(false) && !context_.is_in_child()) {
        port_->close();
    }
}

std::shared_ptr<Engine> Engine::open(std::string name, const MakeFabric& make) {
    return {new Engine(std::move(name), make), [](Engine* engine) {
                if (!engine->context_.is_in_child()) {
                    delete engine;
                }
            }};
}

Engine::Engine(std::string name, const MakeFabric& make) {
    context_.name = std::move(name);
    context_.owner_pid = ::getpid();
    fabric_ = make(context_);
    context_.fabric = fabric_.get();
}

Engine::~Engine() {
    close();
}

void Engine::begin_call() {
    if (context_.is_in_child()) {
        throw_in_child();
    }
    if (!is_open_.load()) {
        throw Error(Scope::kConfig, "the engine " + context_.name + " is closed");
    }
    [[maybe_unused]] const auto idle = context_.leases.collect();
}

std::shared_ptr<Memory> Engine::allocate(std::uint64_t nbytes, bool prefault) {
    begin_call();
    return with_parent(shared_from_this(), std::make_shared<Memory>(context_, nbytes, prefault));
}

std::shared_ptr<Lease> Engine::add_lease(std::uint64_t address, std::uint64_t nbytes,
                                         std::shared_ptr<void> owner) {
    begin_call();
    auto state = context_.leases.add(address, nbytes, std::move(owner));
    return with_parent(shared_from_this(), std::make_shared<Lease>(context_, std::move(state)));
}

std::shared_ptr<Target> Engine::export_target(std::vector<RangeRequest> requests,
                                              std::span<const std::int32_t> num_chunks,
                                              int chunk_bits, std::uint64_t generation) {
    begin_call();
    TargetSpec spec;
    spec.generation = generation;
    spec.slots = std::make_shared<SlotTable>(num_chunks, chunk_bits);
    std::vector<Range> ranges;
    for (const RangeRequest& request : requests) {
        const LeaseState& lease = *request.lease;
        if (request.nbytes > lease.nbytes || request.offset > lease.nbytes - request.nbytes) {
            throw Error(Scope::kConfig, "range of " + std::to_string(request.nbytes) +
                                            " bytes at offset " + std::to_string(request.offset) +
                                            " leaves its memory of " +
                                            std::to_string(lease.nbytes) + " bytes");
        }
        const std::uint64_t address = lease.address + request.offset;
        ranges.push_back({request.arena_offset, request.nbytes, address});
        spec.exported.push_back(
            {request.arena_offset, request.nbytes, address, request.block, request.offset});
    }
    spec.ranges = RangeTable(std::move(ranges));

    // A block belongs to one open target: renewing it for a fence would cut off the others.
    std::vector<std::shared_ptr<Block>> taken;
    try {
        for (const RangeRequest& request : requests) {
            if (!request.block || std::ranges::find(taken, request.block) != taken.end()) {
                continue;
            }
            if (!request.block->take()) {
                throw Error(Scope::kConfig,
                            "memory is already exported by an open target; close it first");
            }
            taken.push_back(request.block);
        }
        auto port = fabric_->export_target(std::move(spec));
        auto target =
            std::make_shared<Target>(context_, std::move(port), generation, std::move(requests));
        {
            const std::lock_guard lock(mutex_);
            std::erase_if(targets_, [](const auto& known) { return known.expired(); });
            targets_.push_back(target);
        }
        return with_parent(shared_from_this(), std::move(target));
    } catch (...) {
        for (const auto& block : taken) {
            block->give_back();
        }
        throw;
    }
}

std::shared_ptr<Remote> Engine::connect(std::span<const std::byte> descriptor,
                                        const Deadline& deadline) {
    begin_call();
    if (descriptor.size() > kMaxDescriptorBytes) {
        throw Error(Scope::kConfig, "descriptor of " + std::to_string(descriptor.size()) +
                                        " bytes is longer than any of ours");
    }
    ByteReader reader(descriptor);
    const auto magic = reader.get<std::uint32_t>();
    const auto version = reader.get<std::uint16_t>();
    if (magic != kDescriptorMagic || version != kDescriptorVersion) {
        throw Error(Scope::kConfig, "not a descriptor of this version of weightsync (version " +
                                        std::to_string(version) + ", expected " +
                                        std::to_string(kDescriptorVersion) +
                                        "); do both sides run the same one?");
    }
    const std::string fabric = reader.get_text();
    if (fabric != fabric_->name()) {
        throw Error(Scope::kConfig, "descriptor is of fabric '" + fabric + "', this engine is '" +
                                        std::string(fabric_->name()) + "'");
    }
    auto remote = std::make_shared<Remote>(context_, fabric_->connect(reader.rest(), deadline));
    {
        const std::lock_guard lock(mutex_);
        std::erase_if(remotes_, [](const auto& known) { return known.expired(); });
        remotes_.push_back(remote);
    }
    return with_parent(shared_from_this(), std::move(remote));
}

std::vector<std::uint64_t> Engine::counters() {
    const auto own = context_.counters.read();
    std::vector<std::uint64_t> totals(own.begin(), own.end());
    std::vector<std::shared_ptr<Target>> targets;
    {
        const std::lock_guard lock(mutex_);
        for (const auto& known : targets_) {
            if (auto target = known.lock(); target && target->is_open()) {
                targets.push_back(std::move(target));
            }
        }
    }
    for (const auto& target : targets) {
        const auto counts = target->counters();
        for (std::size_t i = 0; i < totals.size(); ++i) {
            totals[i] += counts[i];
        }
    }
    return totals;
}

void Engine::arm(bool on) {
    context_.progress.armed.store(on ? 1 : 0);
    const std::lock_guard lock(mutex_);
    for (const auto& known : targets_) {
        if (const auto target = known.lock(); target && target->is_open()) {
            target->arm(on);
        }
    }
}

void Engine::close() noexcept {
    if (!is_open_.exchange(false) || context_.is_in_child()) {
        return;
    }
    std::vector<std::weak_ptr<Target>> targets;
    std::vector<std::weak_ptr<Remote>> remotes;
    {
        const std::lock_guard lock(mutex_);
        targets.swap(targets_);
        remotes.swap(remotes_);
    }
    for (const auto& known : remotes) {
        if (const auto remote = known.lock()) {
            remote->close();
        }
    }
    for (const auto& known : targets) {
        if (const auto target = known.lock()) {
            target->close();
        }
    }
    fabric_->stop();
    [[maybe_unused]] const auto idle = context_.leases.collect();
}

}  // namespace weightsync
