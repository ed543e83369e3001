// Messages of a peer group. A sender owns `window` positions in the receiver's arena and fills them
// in turn; the receiver copies a message out and gives the position back as a credit.
//
// Message n lies at position n % window and sets the slot of turn (n / window) % 2; so does its
// credit at the sender. Why two turns are exact: message n + window is posted only when message n
// is locally complete and credited. So who sees it knows that no copy of message n is on its way
// any more (F1), and may empty the slot of message n. A copy that came earlier set the slot of
// message n once more, which nobody looks at then. Credits are kept apart in the same way: the
// credit of n + window is posted only when that of n is locally complete.
#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <utility>

#include <weightsync/group.hpp>

namespace weightsync {

namespace {

struct Header {
    std::uint64_t number;  // of the message, from its sender to this receiver
    std::uint64_t nbytes;
};
constexpr std::uint64_t kLineBytes = 64;

// Gives a turn back at the end of a scope.
class TurnGuard {
  public:
    explicit TurnGuard(Turn& turn) : turn_(turn) {}
    ~TurnGuard() { turn_.give(); }
    TurnGuard(const TurnGuard&) = delete;
    TurnGuard& operator=(const TurnGuard&) = delete;

  private:
    Turn& turn_;
};

}  // namespace

std::uint64_t PeerGroup::stride() const noexcept {
    return (sizeof(Header) + options_.message_bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
}

std::int32_t PeerGroup::message_slot(std::uint32_t lane, std::uint64_t number) const {
    const std::uint64_t window = options_.window;
    const std::uint64_t position = lane * window + number % window;
    return static_cast<std::int32_t>(kBarrierRounds + 2 * position + number / window % 2);
}

std::int32_t PeerGroup::credit_slot(std::uint32_t lane, std::uint64_t number) const {
    const std::uint64_t num_messages = std::uint64_t{2} * num_lanes() * options_.window;
    return static_cast<std::int32_t>(num_messages) + message_slot(lane, number);
}

std::uint64_t PeerGroup::message_offset(std::uint32_t lane, std::uint64_t number) const {
    return (std::uint64_t{lane} * options_.window + number % options_.window) * stride();
}

// --- sending

void PeerGroup::check_message(std::span<const std::byte> bytes) const {
    if (bytes.size() > options_.message_bytes) {
        throw Error(Scope::kConfig, "message of " + std::to_string(bytes.size()) +
                                        " bytes; this group was opened with message_bytes=" +
                                        std::to_string(options_.message_bytes));
    }
}

void PeerGroup::check_sent(const Lane& lane) const {
    for (const auto& operation : lane.sent) {
        if (const Error* error = operation ? operation->error() : nullptr) {
            Facts facts = error->facts();
            facts.emplace_back("member", std::int64_t{lane.member});
            throw Error(error->scope(),
                        "an earlier message to " + name_of(lane) +
                            " failed, and none can follow "
                            "it; open a new group: " +
                            error->detail(),
                        std::move(facts));
        }
    }
}

bool PeerGroup::has_credit(const Lane& lane) const {
    const std::uint64_t number = lane.num_sent.load();
    return number < options_.window ||
           target_->has_arrived(
               credit_slot(lane_of(options_.index, lane.member), number - options_.window));
}

std::shared_ptr<Operation> PeerGroup::post_message(Lane& lane, std::span<const std::byte> bytes) {
    const std::uint64_t number = lane.num_sent.load();
    const std::uint32_t here = lane_of(options_.index, lane.member);
    if (number >= 2 * std::uint64_t{options_.window}) {
        // The credit before the one that we have just seen: no copy of it comes any more.
        target_->reset(std::array{credit_slot(here, number)});
    }
    std::byte* place = staging_->data() + message_offset(here, number);
    const Header header{number, bytes.size()};
    std::memcpy(place, &header, sizeof(header));
    if (!bytes.empty()) {
        std::memcpy(place + sizeof(header), bytes.data(), bytes.size());
    }
    const std::uint32_t there = lane_of(lane.member, options_.index);
    const std::array<Write, 1> row{{{reinterpret_cast<std::uint64_t>(place),
                                     message_offset(there, number), sizeof(header) + bytes.size(),
                                     std::int64_t{message_slot(there, number)} << chunk_bits_}}};
    auto operation = lane.remote->post(row);
    lane.sent[number % options_.window] = operation;
    lane.num_sent.store(number + 1);
    return operation;
}

std::shared_ptr<Operation> PeerGroup::try_send(std::int64_t member,
                                               std::span<const std::byte> bytes) {
    check_message(bytes);
    Lane& lane = connected_lane(member);
    if (!lane.sending.try_take()) {
        return nullptr;
    }
    const TurnGuard guard(lane.sending);
    check_sent(lane);
    const auto& before = lane.sent[lane.num_sent.load() % options_.window];
    if (!has_credit(lane) || (before && !before->is_done())) {
        return nullptr;
    }
    return post_message(lane, bytes);
}

bool PeerGroup::can_send(std::int64_t member) {
    Lane& lane = connected_lane(member);
    if (!lane.sending.try_take()) {
        return false;
    }
    const TurnGuard guard(lane.sending);
    check_sent(lane);
    const auto& before = lane.sent[lane.num_sent.load() % options_.window];
    return has_credit(lane) && (!before || before->is_done());
}

std::shared_ptr<Operation> PeerGroup::send(std::int64_t member, std::span<const std::byte> bytes,
                                           const Deadline& deadline) {
    check_message(bytes);
    Lane& lane = connected_lane(member);
    const auto throw_full = [&]() -> std::shared_ptr<Operation> {
        throw Error(Scope::kTimeout,
                    "no room for a message to " + name_of(lane) + " after " +
                        seconds_text(deadline.budget_s()) + ": it has not taken out the last " +
                        std::to_string(options_.window),
                    {{"member", member}, {"peer", lane.remote->info().peer}});
    };
    if (!lane.sending.take(*context_.fabric, deadline)) {
        return throw_full();
    }
    const TurnGuard guard(lane.sending);
    check_sent(lane);
    if (!target_->wait_for([&] { return has_credit(lane); }, deadline)) {
        check_sent(lane);
        return throw_full();
    }
    if (const auto& before = lane.sent[lane.num_sent.load() % options_.window]) {
        before->wait(deadline);  // was received, so this is a matter of moments
    }
    return post_message(lane, bytes);
}

// --- receiving

bool PeerGroup::has_message(const Lane& lane) const {
    return target_->has_arrived(
        message_slot(lane_of(options_.index, lane.member), lane.num_received.load()));
}

void PeerGroup::pay_credits(Lane& lane) {
    if (!lane.is_connected.load()) {
        return;  // they stay owed until connect()
    }
    const std::uint32_t there = lane_of(lane.member, options_.index);
    while (lane.num_credited < lane.num_received.load()) {
        try {
            lane.credits[lane.num_credited % options_.window] =
                tell(lane, credit_slot(there, lane.num_credited), 0);
        } catch (const Error&) {
            return;  // closed: nobody waits for credits any more, and the message is ours
        }
        ++lane.num_credited;
    }
}

// Null when there is none, or without a deadline when it would have to wait.
std::optional<Message> PeerGroup::take_message(Lane& lane, const Deadline* deadline) {
    if (!has_message(lane) || !lane.receiving.try_take()) {
        return std::nullopt;
    }
    const TurnGuard guard(lane.receiving);
    if (!has_message(lane)) {  // another thread was quicker
        return std::nullopt;
    }
    const std::uint64_t number = lane.num_received.load();
    const std::uint32_t here = lane_of(options_.index, lane.member);
    if (const auto& credit = lane.credits[number % options_.window]; credit && !credit->is_done()) {
        if (deadline == nullptr) {
            return std::nullopt;
        }
        try {
            credit->wait(*deadline);
        } catch (const Error&) {
            if (!credit->is_done()) {
                throw;
            }
        }
    }
    target_->flush();
    const std::byte* place = arena_->data() + message_offset(here, number);
    Header header{};
    std::memcpy(&header, place, sizeof(header));
    if (header.number != number || header.nbytes > options_.message_bytes) {
        throw Error(Scope::kTransfer,
                    name_of(lane) + " wrote message " + std::to_string(header.number) + " of " +
                        std::to_string(header.nbytes) + " bytes where message " +
                        std::to_string(number) + " was due; open a new group",
                    {{"member", std::int64_t{lane.member}}});
    }
    Message message;
    message.member = lane.member;
    message.bytes.assign(place + sizeof(header), place + sizeof(header) + header.nbytes);
    if (number >= options_.window) {
        target_->reset(std::array{message_slot(here, number - options_.window)});
    }
    lane.num_received.store(number + 1);
    pay_credits(lane);
    return message;
}

template <class Use>
std::optional<Message> PeerGroup::first_message(std::int64_t member, const Use& use) {
    if (member != kAnyMember) {
        return use(lane_to(member));
    }
    const std::uint32_t first = next_lane_.load();
    for (std::uint32_t i = 0; i < num_lanes(); ++i) {
        const std::uint32_t at = (first + i) % num_lanes();
        if (auto message = use(*lanes_[at])) {
            next_lane_.store((at + 1) % num_lanes());
            return message;
        }
    }
    return std::nullopt;
}

std::optional<Message> PeerGroup::try_receive(std::int64_t member) {
    return first_message(member, [this](Lane& lane) { return take_message(lane, nullptr); });
}

bool PeerGroup::can_receive(std::int64_t member) const {
    if (!target_->is_open()) {
        target_->wait({}, Deadline::after(0));  // throws
    }
    if (member != kAnyMember) {
        return has_message(lane_to(member));
    }
    return std::ranges::any_of(lanes_, [this](const auto& lane) { return has_message(*lane); });
}

Message PeerGroup::receive(std::int64_t member, const Deadline& deadline) {
    if (member != kAnyMember) {
        [[maybe_unused]] const Lane& known = lane_to(member);
    }
    const auto is_free = [this](const Lane& lane) {
        return has_message(lane) && !lane.receiving.is_taken();
    };
    const auto ready = [&] {
        return member == kAnyMember
                   ? std::ranges::any_of(lanes_, [&](const auto& lane) { return is_free(*lane); })
                   : is_free(lane_to(member));
    };
    for (;;) {
        auto message =
            first_message(member, [&](Lane& lane) { return take_message(lane, &deadline); });
        if (message) {
            target_->wake_waiters();  // the next message is free for another thread
            return std::move(*message);
        }
        if (!target_->wait_for(ready, deadline)) {
            throw Error(Scope::kTimeout,
                        "no message from " +
                            (member == kAnyMember
                                 ? "any of " + std::to_string(num_lanes()) + " other members"
                                 : name_of(lane_to(member))) +
                            " after " + seconds_text(deadline.budget_s()));
        }
    }
}

}  // namespace weightsync
