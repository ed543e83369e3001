// Peer groups: who is in it, and barriers. Messages are in mailbox.cpp.
#include <weightsync/group.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <string>
#include <utility>

#include <weightsync/codec.hpp>

namespace weightsync {

namespace {

constexpr std::uint32_t kGroupMagic = 0x47505357;  // "WSPG"
constexpr std::uint16_t kGroupVersion = 1;

std::uint32_t checked(const GroupOptions& options) {
    if (options.size < 1 || options.size > kMaxMembers || options.index >= options.size) {
        throw Error(Scope::kConfig, "member " + std::to_string(options.index) + " of a group of " +
                                        std::to_string(options.size) +
                                        ": members are 0 .. size-1 "
                                        "and at most " +
                                        std::to_string(kMaxMembers));
    }
    if (options.message_bytes < 1 || options.message_bytes > kMaxMessageBytes) {
        throw Error(Scope::kConfig, "message_bytes=" + std::to_string(options.message_bytes) +
                                        ": give 1 .. " + std::to_string(kMaxMessageBytes));
    }
    if (options.window < 1 || options.window > kMaxWindow) {
        throw Error(Scope::kConfig, "window=" + std::to_string(options.window) + ": give 1 .. " +
                                        std::to_string(kMaxWindow));
    }
    return options.size - 1;
}

RangeRequest whole(const Memory& memory) {
    RangeRequest range;
    range.lease = memory.lease();
    range.block = memory.block();
    range.nbytes = memory.nbytes();
    return range;
}

}  // namespace

bool Turn::take(Fabric& fabric, const Deadline& deadline) {
    while (!try_take()) {
        if (!fabric.wait(word_, [this] { return !is_taken(); }, deadline)) {
            return false;
        }
    }
    return true;
}

std::shared_ptr<PeerGroup> Engine::open_group(const GroupOptions& options) {
    begin_call();
    return std::make_shared<PeerGroup>(*this, context_, options);
}

PeerGroup::PeerGroup(Engine& engine, EngineContext& context, const GroupOptions& options)
    : context_(context), engine_(engine), options_(options) {
    const std::uint32_t lanes = checked(options);
    const std::uint32_t chunks = std::max(lanes, 1U);
    chunk_bits_ = std::bit_width(chunks - 1);
    // Barriers: one chunk per member and round. Messages and credits: one slot for each position of
    // each lane and each of two turns, so that a second arrival of one use is not taken for the
    // next one.
    std::vector<std::int32_t> slots(kBarrierRounds, static_cast<std::int32_t>(chunks));
    slots.resize(kBarrierRounds + std::size_t{4} * lanes * options.window, 1);
    const std::uint64_t nbytes = std::uint64_t{lanes} * options.window * stride();
    arena_ = engine.allocate(std::max(nbytes, stride()), true);
    staging_ = engine.allocate(std::max(nbytes, stride()), true);
    target_ = engine.export_target({whole(*arena_)}, slots, chunk_bits_, options.generation);
    for (std::uint32_t member = 0; member < options.size; ++member) {
        if (member != options.index) {
            auto lane = std::make_unique<Lane>();
            lane->member = member;
            lane->sent.resize(options.window);
            lane->credits.resize(options.window);
            lanes_.push_back(std::move(lane));
        }
    }
}

PeerGroup::~PeerGroup() {
    close();
}

void PeerGroup::close() noexcept {
    // First, so that who waits here learns that the group was closed, not what becomes of a message
    // for that reason.
    target_->close();
    for (const auto& lane : lanes_) {
        if (lane->is_connected.load()) {
            lane->remote->close();
        }
    }
}

std::vector<std::byte> PeerGroup::descriptor() const {
    ByteWriter writer;
    writer.put(kGroupMagic).put(kGroupVersion).put(options_.index).put(options_.size);
    writer.put(options_.message_bytes).put(options_.window);
    return writer.put_bytes(target_->descriptor()).take();
}

PeerGroup::Lane& PeerGroup::lane_to(std::int64_t member) const {
    if (member < 0 || member >= std::int64_t{options_.size} || member == options_.index) {
        throw Error(Scope::kConfig, "member " + std::to_string(member) +
                                        " is not another one of this group of " +
                                        std::to_string(options_.size) + " (this is member " +
                                        std::to_string(options_.index) + ")");
    }
    return *lanes_[lane_of(options_.index, static_cast<std::uint32_t>(member))];
}

PeerGroup::Lane& PeerGroup::connected_lane(std::int64_t member) const {
    Lane& lane = lane_to(member);
    if (!lane.is_connected.load()) {
        throw Error(Scope::kConfig,
                    "member " + std::to_string(member) + " is not connected; connect to it first",
                    {{"member", member}});
    }
    return lane;
}

std::string PeerGroup::name_of(const Lane& lane) const {
    std::string name = "member " + std::to_string(lane.member);
    if (lane.is_connected.load()) {
        name += " (" + lane.remote->info().peer + ")";
    }
    return name;
}

bool PeerGroup::is_connected(std::int64_t member) const {
    return member == options_.index || lane_to(member).is_connected.load();
}

void PeerGroup::connect(std::int64_t member, std::span<const std::byte> descriptor,
                        const Deadline& deadline) {
    if (member == options_.index) {
        return;
    }
    Lane& lane = lane_to(member);
    ByteReader reader(descriptor);
    if (reader.get<std::uint32_t>() != kGroupMagic ||
        reader.get<std::uint16_t>() != kGroupVersion) {
        throw Error(Scope::kConfig, "not a descriptor of a peer group of this version");
    }
    const auto index = reader.get<std::uint32_t>();
    const auto size = reader.get<std::uint32_t>();
    const auto message_bytes = reader.get<std::uint32_t>();
    const auto window = reader.get<std::uint32_t>();
    if (index != member || size != options_.size || message_bytes != options_.message_bytes ||
        window != options_.window) {
        const auto text = [](std::int64_t number, std::uint32_t of, std::uint32_t nbytes,
                             std::uint32_t count) {
            return "member " + std::to_string(number) + " of " + std::to_string(of) +
                   ", message_bytes=" + std::to_string(nbytes) +
                   ", window=" + std::to_string(count);
        };
        throw Error(Scope::kConfig,
                    "the descriptor is of " + text(index, size, message_bytes, window) +
                        "; expected " +
                        text(member, options_.size, options_.message_bytes, options_.window),
                    {{"member", member}});
    }
    if (lane.is_connecting.exchange(true)) {
        throw Error(Scope::kConfig, name_of(lane) + " is connected already", {{"member", member}});
    }
    try {
        lane.remote = engine_.connect(reader.rest(), deadline);
    } catch (...) {
        lane.is_connecting.store(false);
        throw;
    }
    lane.is_connected.store(true);
    if (!is_open()) {  // closed meanwhile, by another thread that may not have seen it
        lane.remote->close();
    }
    // What it sent before we could answer.
    if (lane.receiving.take(*context_.fabric, deadline)) {
        pay_credits(lane);
        lane.receiving.give();
    }
}

std::shared_ptr<Operation> PeerGroup::tell(const Lane& lane, std::int32_t slot,
                                           std::uint32_t chunk) const {
    const std::array<Write, 1> row{{{0, 0, 0, (std::int64_t{slot} << chunk_bits_) | chunk}}};
    return lane.remote->post(row);
}

std::shared_ptr<BarrierRound> PeerGroup::start_barrier() {
    std::vector<std::int64_t> absent;
    for (const auto& lane : lanes_) {
        if (!lane->is_connected.load()) {
            absent.push_back(lane->member);
        }
    }
    if (!absent.empty()) {
        std::string detail = "members " + ranges_text(absent) +
                             " are not connected, so they cannot be told; connect to all first";
        throw Error(Scope::kConfig, std::move(detail), {{"members", std::move(absent)}});
    }
    const std::lock_guard lock(round_mutex_);
    if (!round_ || round_->is_over_and_seen()) {
        auto next = std::make_shared<BarrierRound>(*this, round_ ? round_->number() + 1 : 0);
        next->tell_all();
        round_ = std::move(next);
    }
    return with_parent(shared_from_this(), round_);
}

void PeerGroup::barrier(const Deadline& deadline) {
    start_barrier()->wait(deadline);
}

std::int32_t BarrierRound::slot() const noexcept {
    return static_cast<std::int32_t>(number_ % kBarrierRounds);
}

void BarrierRound::tell_all() {
    for (const auto& lane : group_.lanes_) {
        try {
            const std::uint32_t chunk = PeerGroup::lane_of(lane->member, group_.options_.index);
            told_.push_back(group_.tell(*lane, slot(), chunk));
        } catch (const Error& error) {
            told_.push_back(nullptr);
            error_ = error;
            state_ = State::kFailed;
        }
    }
}

BarrierRound::State BarrierRound::settle() {
    const std::lock_guard lock(mutex_);
    if (state_ != State::kPending) {
        return state_;
    }
    try {
        if (!group_.target_->is_open()) {
            [[maybe_unused]] const auto none = group_.target_->missing(slot());  // throws
        }
        const bool is_told =
            std::ranges::all_of(told_, [](const auto& operation) { return operation->is_done(); });
        if (!is_told) {
            return state_;
        }
        for (std::size_t i = 0; i < told_.size(); ++i) {
            if (const Error* error = told_[i]->error()) {
                Facts facts = error->facts();
                facts.emplace_back("member", std::int64_t{group_.lanes_[i]->member});
                throw Error(error->scope(),
                            "barrier round " + std::to_string(number_) + ": " +
                                group_.name_of(*group_.lanes_[i]) +
                                " could not be told: " + error->detail(),
                            std::move(facts));
            }
        }
        if (!told_.empty() && !group_.target_->has_arrived(slot())) {
            return state_;
        }
        const auto next = static_cast<std::int32_t>((number_ + 2) % kBarrierRounds);
        group_.target_->reset(std::array{next});
        state_ = State::kOver;
    } catch (const Error& error) {
        error_ = error;
        state_ = State::kFailed;
    }
    return state_;
}

BarrierRound::State BarrierRound::see() {
    const State state = settle();
    const std::lock_guard lock(mutex_);
    is_seen_ = is_seen_ || state != State::kPending;
    return state;
}

bool BarrierRound::is_over_and_seen() {
    const std::lock_guard lock(mutex_);
    return state_ == State::kOver && is_seen_;
}

bool BarrierRound::is_done() {
    return see() != State::kPending;
}

std::optional<Error> BarrierRound::error() {
    [[maybe_unused]] const State state = see();
    const std::lock_guard lock(mutex_);
    return error_;
}

void BarrierRound::wait(const Deadline& deadline) {
    bool is_told = settle() != State::kPending;
    for (std::size_t i = 0; i < told_.size() && !is_told; ++i) {
        try {
            told_[i]->wait(deadline);
        } catch (const Error&) {
            if (!told_[i]->is_done()) {
                throw_timeout(deadline);
            }
        }
    }
    if (settle() == State::kPending) {
        const auto has_come = [this] { return group_.target_->has_arrived(slot()); };
        [[maybe_unused]] const bool have_come = group_.target_->wait_for(has_come, deadline);
    }
    const State state = see();
    if (state == State::kPending) {
        throw_timeout(deadline);
    }
    if (state == State::kFailed) {
        throw *error();
    }
}

void BarrierRound::throw_timeout(const Deadline& deadline) const {
    std::vector<std::int64_t> members;
    std::string names;
    const auto add = [&](std::size_t lane, const char* what) {
        const PeerGroup::Lane& other = *group_.lanes_[lane];
        members.push_back(other.member);
        names += (names.empty() ? "" : "; ") + group_.name_of(other) + what;
    };
    const std::vector<std::int64_t> absent = group_.target_->missing(slot());
    for (std::size_t i = 0; i < told_.size(); ++i) {
        if (std::ranges::find(absent, static_cast<std::int64_t>(i)) != absent.end()) {
            add(i, " has not come");
        } else if (told_[i] && !told_[i]->is_done()) {
            add(i, " has come but does not take our word");
        }
    }
    throw Error(Scope::kTimeout,
                "barrier round " + std::to_string(number_) + " of " +
                    std::to_string(group_.options_.size) + " members not over after " +
                    seconds_text(deadline.budget_s()) + ": " + names,
                {{"members", std::move(members)}});
}

}  // namespace weightsync
