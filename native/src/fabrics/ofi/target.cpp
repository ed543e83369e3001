#include "target.hpp"

#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "../../net/handshake.hpp"

namespace weightsync::ofi {

using namespace std::chrono_literals;

namespace {

// Deep enough for what arrives between two polls; providers hold back what does not fit.
constexpr std::size_t kTargetQueue = 2048;
constexpr std::size_t kBatch = 32;
constexpr int kPollsPerTurn = 8;
constexpr std::chrono::milliseconds kEndPatience = 1s;

// The provider's writers store into our address space themselves.
bool writes_by_address(const Rail& rail) {
    return rail.domain()->provider().find("shm") != std::string::npos;
}

}  // namespace

Alias::Alias(const Block& block) : nbytes_(block.mapped_nbytes()) {
    void* mapped =
        ::mmap(nullptr, nbytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, block.fd(), 0);
    if (mapped == MAP_FAILED) {
        throw os_error(Scope::kMemory, "mmap", errno, "not enough address space or memory");
    }
    data_ = static_cast<std::byte*>(mapped);
}

Alias::~Alias() {
    if (is_kept_) {
        revoke();
    } else {
        ::munmap(data_, nbytes_);
    }
}

void Alias::revoke() noexcept {
    // At once for all, also for the kernel that stores on behalf of another process; pages it holds
    // already are of the old file, which the block leaves behind. Writable: the provider may store
    // there on our own thread.
    ::mmap(data_, nbytes_, PROT_READ | PROT_WRITE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

TargetEnd::TargetEnd(std::shared_ptr<Rail> rail, std::span<const ExportedRange> ranges,
                     std::vector<std::uint64_t> addresses, std::shared_ptr<Board> board)
    : rail_(std::move(rail)),
      board_(std::move(board)),
      endpoint_(rail_->domain(), kTargetQueue),
      addresses_(std::move(addresses)),
      data_bytes_(rail_->domain()->info()->domain_attr->cq_data_size) {
    const auto& domain = rail_->domain();
    const auto add = [&](std::uint64_t address, std::uint64_t nbytes) {
        auto region = std::make_unique<Region>(domain, address, nbytes, abi::FI_REMOTE_WRITE);
        if (domain->binds_regions()) {
            region->bind(endpoint_);
        }
        return region;
    };
    for (std::size_t i = 0; i < addresses_.size(); ++i) {
        regions_.push_back(
            add(addresses_[i], i < ranges.size() ? ranges[i].nbytes : kScratchBytes));
    }
}

TargetView::RailView TargetEnd::view() const {
    const bool uses_addresses = rail_->domain()->uses_addresses();
    TargetView::RailView view;
    view.data_bytes = data_bytes_;
    view.name = endpoint_.name();
    for (std::size_t i = 0; i < regions_.size(); ++i) {
        view.regions.push_back({uses_addresses ? addresses_[i] : 0, regions_[i]->key()});
    }
    view.scratch = view.regions.back();
    view.regions.pop_back();
    return view;
}

void TargetEnd::arrive(std::span<const abi::fi_cq_data_entry> entries) noexcept {
    // Counted first and marked then: who sees a slot complete finds its chunks counted.
    Tally tally;
    std::array<std::uint32_t, kBatch> immediates;
    std::array<Mark, kBatch> expected;
    std::size_t num_marks = 0;
    for (const abi::fi_cq_data_entry& entry : entries) {
        if ((entry.flags & abi::FI_REMOTE_CQ_DATA) == 0) {
            continue;
        }
        const auto low = static_cast<std::uint32_t>(entry.data);
        if (low == kProbeData) {
            continue;
        }
        const std::uint64_t nbytes = entry.data >> 32U;
        tally.bytes += data_bytes_ >= sizeof(entry.data) ? nbytes : entry.len;
        if (low < kNoImmediateData) {
            immediates[num_marks] = low;
            expected[num_marks] = board_->look(low);
            tally.add(expected[num_marks++]);
        }
    }
    board_->account(tally);
    for (std::size_t i = 0; i < num_marks; ++i) {
        const Mark mark = board_->mark(immediates[i]);
        if (mark == Mark::kDuplicate && expected[i] == Mark::kNew) {
            // Twice in this batch, or by another rail meanwhile.
            board_->account({.arrivals = ~std::uint64_t{0}, .duplicates = 1});
        }
    }
    rail_->bytes_in.fetch_add(tally.bytes, std::memory_order_relaxed);  // a statistic
}

bool TargetEnd::take_batch() noexcept {
    std::array<abi::fi_cq_data_entry, kBatch> entries;
    const ssize_t count = endpoint_.poll(entries);
    if (is_closing_ && !keeps_arrivals_) {
        return false;  // fenced meanwhile: what arrived is void
    }
    if (count > 0) {
        arrive(std::span(entries).first(static_cast<std::size_t>(count)));
        return true;
    }
    if (count == -abi::FI_EAVAIL) {
        // A peer that went away or wrote what it must not: its business. It finds out by its own
        // completions.
        [[maybe_unused]] const auto error = endpoint_.next_error();
        Tally tally;
        tally.unknown = 1;
        board_->account(tally);
        return true;
    }
    if (count < 0) {
        is_broken_ = true;
        report("the completion queue of " + rail_->domain()->label() +
               " is broken: " + library().strerror(static_cast<int>(-count)));
    }
    return false;
}

void TargetEnd::take_rest() noexcept {
    for (std::size_t batch = 0; batch < kTargetQueue && !is_broken_ && take_batch(); ++batch) {
    }
}

bool TargetEnd::progress() noexcept {
    const std::unique_lock lock(endpoint_.mutex(), std::try_to_lock);
    if (!lock || !endpoint_.is_open()) {
        return false;
    }
    bool has_moved = false;
    for (int batch = 0; batch < kPollsPerTurn && !is_broken_ && !is_closing_; ++batch) {
        if (!take_batch()) {
            break;
        }
        has_moved = true;
    }
    if (is_closing_) {
        close_locked();
    }
    return has_moved;
}

Pollable::Rest TargetEnd::rest() noexcept {
    Rest rest;
    const std::unique_lock lock(endpoint_.mutex(), std::try_to_lock);
    if (!lock || !endpoint_.is_open() || is_broken_) {
        rest.is_expecting = false;
        return rest;
    }
    rest.wait_fd = endpoint_.wait_fd();
    // Without a descriptor nobody wakes us, so sources say that they are there.
    rest.is_expecting = rest.wait_fd >= 0 || is_expecting_;
    rest.may_sleep = rest.wait_fd < 0 || endpoint_.may_sleep();
    return rest;
}

void TargetEnd::close_locked() noexcept {
    // First the keys, then whatever has begun with them.
    regions_.clear();
    if (keeps_arrivals_ && endpoint_.is_open()) {
        // What was acknowledged is never sent again, so it must be marked. Before the endpoint
        // goes, for hardware that forgets its completions with it; and after, for what came in
        // between.
        take_rest();
        endpoint_.stop();
        take_rest();
    }
    endpoint_.close();
}

bool TargetEnd::close(std::chrono::milliseconds patience) noexcept {
    is_closing_ = true;
    const std::unique_lock lock = endpoint_.lock_within(patience);
    if (!lock) {
        return false;
    }
    close_locked();
    return true;
}

OfiTarget::Session::~Session() {
    for (const auto& alias : aliases) {
        if (!has_hung_up) {
            alias->keep_reserved();
        }
    }
}

OfiTarget::OfiTarget(EngineContext& context, net::Reactor& reactor, net::Listener& listener,
                     std::span<const std::shared_ptr<Rail>> rails, TargetSpec spec)
    : context_(context),
      reactor_(reactor),
      listener_(listener),
      rails_(rails.begin(), rails.end()),
      spec_(std::move(spec)),
      scratch_(std::make_shared<Block>(kScratchBytes, true)),
      board_(std::make_shared<Board>(spec_.make_board(context.progress.event.get()))) {
    // In the order in which a RangeTable has them.
    std::ranges::sort(spec_.exported, {}, &ExportedRange::arena_offset);
    const bool by_address =
        std::ranges::any_of(rails_, [](const auto& rail) { return writes_by_address(*rail); });
    std::vector<ExportedRange> ranges = spec_.exported;
    ranges.push_back({.nbytes = kScratchBytes,
                      .address = reinterpret_cast<std::uint64_t>(scratch_->data()),
                      .block = scratch_});
    for (const ExportedRange& range : ranges) {
        if (!by_address) {
            addresses_.push_back(range.address);
            continue;
        }
        if (!range.block) {
            throw Error(Scope::kConfig,
                        "sources of " + std::string(context.fabric->name()) +
                            " store into memory by themselves, which can be fenced only in memory "
                            "that the engine allocated; use allocate() (staged mode), or another "
                            "fabric");
        }
        auto known = std::ranges::find(blocks_, range.block);
        if (known == blocks_.end()) {
            aliases_.push_back(std::make_shared<Alias>(*range.block));
            blocks_.push_back(range.block);
            known = blocks_.end() - 1;
        }
        const auto& alias = aliases_[static_cast<std::size_t>(known - blocks_.begin())];
        addresses_.push_back(reinterpret_cast<std::uint64_t>(alias->data()) + range.block_offset);
    }
    slots_.resize(rails_.size());
    for (std::size_t i = 0; i < rails_.size(); ++i) {
        build(i);
    }
    descriptor_.pid = static_cast<std::uint32_t>(::getpid());
    descriptor_.generation = spec_.generation;
    descriptor_.key = net::make_key();
    descriptor_.endpoints = listener_.endpoints();
    descriptor_.target_id = listener_.next_target_id();
}

void OfiTarget::build(std::size_t rail) {
    RailSlot& slot = slots_[rail];
    if (slot.end) {
        return;
    }
    auto end = std::make_shared<TargetEnd>(rails_[rail], spec_.exported, addresses_, board_);
    slot.view = end->view();
    slot.view.attempt = ++slot.attempt;
    slot.end = std::move(end);
}

void OfiTarget::start() {
    for (const RailSlot& slot : slots_) {
        slot.end->rail()->add(slot.end);
    }
    listener_.serve(descriptor_.target_id, descriptor_.key, descriptor_.generation,
                    [weak = weak_from_this()](net::Accepted accepted) {
                        if (const auto self = weak.lock()) {
                            self->accept(std::move(accepted));
                        }
                    });
}

void OfiTarget::accept(net::Accepted accepted) {
    TargetView view;
    view.chunk_bits = static_cast<std::uint16_t>(spec_.slots->chunk_bits());
    for (const ExportedRange& range : spec_.exported) {
        view.ranges.push_back({range.arena_offset, range.nbytes});
    }
    auto session = std::make_shared<Session>(std::move(accepted.socket));
    const std::lock_guard lock(mutex_);
    if (is_shut_) {
        throw Error(Scope::kFenced, "the target is closed");
    }
    for (RailSlot& slot : slots_) {
        // A rail that is fenced just now: the source finds out, and asks for the next attempt.
        view.rails.push_back(slot.view);
        if (slot.end) {
            slot.end->set_expecting(true);
            slot.end->rail()->wake();
        }
    }
    session->id = next_session_++;
    session->aliases = aliases_;
    for (const EncodedFrame& frame : encode(view)) {
        session->channel.send(static_cast<std::uint8_t>(frame.type), frame.payload);
    }
    for (const auto& block : blocks_) {
        block->set_exposed();
    }
    // The handler owns the session: it lives until the source hangs up.
    const int fd = session->channel.socket();
    session->watch = reactor_.watch(
        fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
        [session, weak = weak_from_this(), &reactor = reactor_](std::uint32_t /*events*/) {
            const auto self = weak.lock();
            // A target that is gone only waits for the source to hang up.
            const bool is_alive = self ? self->on_event(*session)
                                       : session->channel.flush() &&
                                             session->channel.receive([](const net::Frame&) {});
            if (!is_alive) {
                session->has_hung_up = true;
                if (self) {
                    self->forget(session->id);
                }
                reactor.unwatch(session->watch);
            }
            return false;
        });
    sessions_.emplace(session->id, std::move(session));
}

bool OfiTarget::on_event(Session& session) {
    try {
        return session.channel.flush() &&
               session.channel.receive([&](const net::Frame& frame) { on_frame(session, frame); });
    } catch (const Error& error) {
        board_->header().protocol_errors.fetch_add(1, std::memory_order_relaxed);
        report("ofi fabric: a source was cut off: " + std::string(error.what()));
        return false;
    }
}

void OfiTarget::on_frame(Session& session, const net::Frame& frame) {
    switch (static_cast<FrameType>(frame.type)) {
        case FrameType::kFenceRail:
            fence_rail(session, decode_frame<RailAttempt>(frame.payload));
            return;
        case FrameType::kOpenRail:
            open_rail(session, decode_frame<RailAttempt>(frame.payload));
            return;
        case FrameType::kPing:
            session.channel.send(static_cast<std::uint8_t>(FrameType::kPong), frame.payload);
            return;
        default:
            throw Error(Scope::kTransfer, "unexpected message " + std::to_string(frame.type));
    }
}

// One endpoint serves all sources, so it ends for all of them; the others open the next one at
// once. Closing takes milliseconds, so it is done on this thread, and once.
void OfiTarget::fence_rail(Session& session, RailAttempt which) {
    const auto moved = static_cast<std::uint8_t>(FrameType::kRailMoved);
    std::shared_ptr<TargetEnd> end;
    {
        const std::lock_guard lock(mutex_);
        if (is_shut_) {
            return;
        }
        if (which.rail >= slots_.size() || writes_by_address(*rails_[which.rail])) {
            session.channel.send(static_cast<std::uint8_t>(FrameType::kRefused),
                                 net::bytes_of(which));
            return;
        }
        const RailSlot& slot = slots_[which.rail];
        if (which.attempt < slot.attempt || !slot.end) {
            session.channel.send(moved, net::bytes_of(which));
            return;
        }
        end = slot.end;
    }
    end->keep_arrivals();
    if (!end->close(kEndPatience)) {
        return;  // the rail's thread does it; the source asks again
    }
    end->rail()->remove(*end);
    const std::lock_guard lock(mutex_);
    if (is_shut_) {
        return;
    }
    RailSlot& slot = slots_[which.rail];
    slot.end.reset();
    const RailAttempt done{which.rail, slot.attempt};
    for (const auto& [id, other] : sessions_) {
        const bool is_ours = id == session.id;
        other->channel.send(is_ours ? static_cast<std::uint8_t>(FrameType::kRailFenced) : moved,
                            net::bytes_of(done));
    }
}

void OfiTarget::open_rail(Session& session, RailAttempt which) {
    const std::lock_guard lock(mutex_);
    if (is_shut_) {
        return;
    }
    try {
        if (which.rail >= slots_.size() || which.attempt > slots_[which.rail].attempt) {
            throw Error(Scope::kTransfer, "there is no such rail");
        }
        RailSlot& slot = slots_[which.rail];
        if (!slot.end) {
            build(which.rail);
            slot.end->set_expecting(true);
            slot.end->rail()->add(slot.end);
        }
        for (const EncodedFrame& frame : encode(which.rail, slot.view)) {
            session.channel.send(static_cast<std::uint8_t>(frame.type), frame.payload);
        }
    } catch (const Error&) {
        session.channel.send(static_cast<std::uint8_t>(FrameType::kRefused), net::bytes_of(which));
    }
}

void OfiTarget::forget(std::uint64_t session) noexcept {
    const std::lock_guard lock(mutex_);
    sessions_.erase(session);
    for (const RailSlot& slot : slots_) {
        if (slot.end) {
            slot.end->set_expecting(!sessions_.empty());
        }
    }
}

bool OfiTarget::shut(FrameType why) noexcept {
    listener_.stop_serving(descriptor_.target_id);
    const std::lock_guard lock(mutex_);
    if (is_shut_) {
        return false;
    }
    is_shut_ = true;
    for (const auto& [id, session] : sessions_) {
        session->channel.send(static_cast<std::uint8_t>(why));
    }
    sessions_.clear();  // the reactor holds them on
    for (const auto& alias : aliases_) {
        alias->revoke();
    }
    aliases_.clear();
    return true;
}

void OfiTarget::close_ends() noexcept {
    std::vector<RailSlot> slots;
    {
        const std::lock_guard lock(mutex_);
        slots.swap(slots_);
    }
    for (const RailSlot& slot : slots) {
        if (!slot.end) {
            continue;
        }
        slot.end->rail()->remove(*slot.end);
        if (!slot.end->close(kEndPatience)) {
            report("the provider of " + slot.end->rail()->domain()->label() +
                   " does not return from a poll; a peer may be stopped inside of it");
        }
    }
}

void OfiTarget::fence(bool discard) {
    if (!shut(FrameType::kFenced)) {
        return;
    }
    std::optional<Error> failure;
    for (const auto& block : blocks_) {
        try {
            block->renew(!discard);
        } catch (const Error& error) {
            failure = error;
        }
    }
    close_ends();
    if (failure) {
        throw std::move(*failure);
    }
}

void OfiTarget::close() noexcept {
    if (shut(FrameType::kClosed)) {
        close_ends();
    }
}

}  // namespace weightsync::ofi
