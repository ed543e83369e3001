#include "wire.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace weightsync::sim {

namespace {

// A fast NIC: the numbers only decide in which order events of one moment come.
constexpr Nanoseconds kLatency_ns = 2000;
constexpr std::uint64_t kBytesPerNs = 50;
// How far writes may overtake each other when they are only reordered.
constexpr Nanoseconds kReorderWindow_ns = 100'000;
constexpr int kMaxRails = 64;

Nanoseconds to_ns(double seconds) noexcept {
    constexpr double kMax_s = 1e9;
    return static_cast<Nanoseconds>(std::clamp(seconds, 0.0, kMax_s) * kNsPerSecond);
}

Facts facts_of(const Operation& operation, const Write& row) {
    const RemoteInfo& remote = operation.remote();
    Facts facts{{"peer", remote.peer}, {"rail", std::string("sim")}};
    if (row.immediate >= 0) {
        facts.emplace_back("slot", row.immediate >> remote.chunk_bits);
        facts.emplace_back("chunk", row.immediate & ((std::int64_t{1} << remote.chunk_bits) - 1));
    }
    return facts;
}

}  // namespace

void Wire::set_faults(const std::string& engine, const SimFaults& faults) {
    for (const double chance :
         {faults.duplicate, faults.drop, faults.late, faults.invisible, faults.resend}) {
        if (!(chance >= 0 && chance <= 1)) {
            throw Error(Scope::kConfig, "chances of faults are 0 .. 1");
        }
    }
    if (!(faults.delay_s >= 0 && faults.late_s >= 0)) {
        throw Error(Scope::kConfig, "delays of faults are not negative");
    }
    if (faults.rails < 1 || faults.rails > kMaxRails) {
        throw Error(Scope::kConfig, "rails are 1 .. " + std::to_string(kMaxRails));
    }
    const std::lock_guard lock(mutex_);
    faults_[engine] = faults;
}

const SimFaults& Wire::faults_of(const std::string& engine) const {
    static const SimFaults kNone;
    for (const auto& name : {engine, std::string()}) {
        if (const auto found = faults_.find(name); found != faults_.end()) {
            return found->second;
        }
    }
    return kNone;
}

void Wire::freeze(const std::string& engine, int rail) {
    const std::lock_guard lock(mutex_);
    frozen_.emplace(engine, rail);
}

bool Wire::is_frozen(const Event& event) const {
    const std::string& engine = event.transfer->engine;
    return frozen_.contains({engine, kAllRails}) || frozen_.contains({engine, event.rail});
}

void Wire::thaw(const std::string& engine) {
    const std::lock_guard lock(mutex_);
    std::erase_if(frozen_, [&](const auto& frozen) { return frozen.first == engine; });
    const auto held = held_.extract(engine);
    if (!held.empty()) {
        for (const EventPtr& event : held.mapped()) {
            event->time = now_ + kLatency_ns;
            push(event);
        }
    }
    changed_.notify_all();
}

void Wire::kill(const std::string& engine) {
    const std::lock_guard lock(mutex_);
    killed_.insert(engine);
    held_.erase(engine);
    changed_.notify_all();
}

std::vector<std::pair<std::string, std::uint64_t>> Wire::counts() const {
    const std::lock_guard lock(mutex_);
    std::vector<std::pair<std::string, std::uint64_t>> result;
    for (std::size_t i = 0; i < kTickNames.size(); ++i) {
        result.emplace_back(kTickNames[i], counts_[i]);
    }
    return result;
}

std::shared_ptr<SimTarget> Wire::add_target(EngineContext& context, TargetSpec spec) {
    const std::lock_guard lock(mutex_);
    const std::uint64_t id = next_target_++;
    auto target = std::make_shared<SimTarget>(*this, context, id, std::move(spec));
    targets_.emplace(id, target);
    return target;
}

std::shared_ptr<SimTarget> Wire::find_target(std::uint64_t id) {
    const std::lock_guard lock(mutex_);
    const auto found = targets_.find(id);
    auto target = found == targets_.end() ? nullptr : found->second.lock();
    return target && target->is_open_ ? target : nullptr;
}

void Wire::detach(const std::string& engine) noexcept {
    const std::lock_guard lock(mutex_);
    engines_.erase(engine);
    held_.erase(engine);
    std::erase_if(frozen_, [&](const auto& frozen) { return frozen.first == engine; });
    killed_.erase(engine);
}

void Wire::post(const std::shared_ptr<Transfer>& transfer) {
    const std::lock_guard lock(mutex_);
    const SimFaults& faults = faults_of(transfer->engine);
    const auto rows = transfer->operation->rows();
    if (rows.empty()) {
        resolve(*transfer, std::nullopt);
    }
    for (std::size_t i = 0; i < rows.size(); ++i) {
        auto event = std::make_shared<Event>();
        event->order = next_order_++;
        event->transfer = transfer;
        event->row = i;
        event->time = now_ + kLatency_ns + rows[i].nbytes / kBytesPerNs;
        event->rail = static_cast<int>(event->order % static_cast<std::uint64_t>(faults.rails));
        Nanoseconds& last = last_time_[{transfer->engine, event->rail}];
        if (faults.delay_s > 0) {
            event->time += to_ns(faults.delay_s * random_.uniform());
            count(Tick::kDelayed);
        }
        if (faults.reorder) {
            event->time += random_.next() % kReorderWindow_ns;
        } else {
            event->time = std::max(event->time, last + 1);
        }
        last = std::max(last, event->time);
        if (random_.happens(faults.drop)) {
            event->fate = Fate::kDrop;
        } else if (random_.happens(faults.late)) {
            event->fate = Fate::kLate;
        }
        event->is_resent = random_.happens(faults.resend);
        event->is_duplicated = random_.happens(faults.duplicate);
        event->is_invisible = random_.happens(faults.invisible);
        push(std::move(event));
    }
    changed_.notify_all();
}

void Wire::cancel(const std::vector<std::shared_ptr<Transfer>>& transfers,
                  const Error& error) noexcept {
    const std::lock_guard lock(mutex_);
    for (const auto& transfer : transfers) {
        if (!transfer->is_over) {
            transfer->num_left = 1;
            resolve(*transfer, error);
        }
    }
    changed_.notify_all();
}

void Wire::close_target(SimTarget& target) noexcept {
    const std::lock_guard lock(mutex_);
    target.is_open_ = false;
    target.invisible_.clear();
    targets_.erase(target.id_);
    changed_.notify_all();
}

void Wire::flush(SimTarget& target) {
    const std::lock_guard lock(mutex_);
    for (const SimTarget::Invisible& part : target.invisible_) {
        std::memcpy(reinterpret_cast<void*>(part.address), part.bytes.data(), part.bytes.size());
        count(Tick::kFlushed);
    }
    target.invisible_.clear();
}

void Wire::run_until(double time_s) {
    const std::lock_guard lock(mutex_);
    const Nanoseconds end = to_ns(time_s);
    while (step_until(end)) {
    }
    now_ = std::max(now_, end);
}

bool Wire::step_until(Nanoseconds end) {
    if (events_.empty() || events_.top()->time > end) {
        return false;
    }
    const EventPtr event = events_.top();
    events_.pop();
    now_ = std::max(now_, event->time);
    deliver(event);
    changed_.notify_all();
    return true;
}

void Wire::deliver(const EventPtr& event) {
    Transfer& transfer = *event->transfer;
    if (event->is_echo) {
        if (event->is_late) {
            count(Tick::kLateLanded);
        }
        land(*event, event->bytes);
        return;
    }
    if (transfer.is_over) {
        return;
    }
    if (killed_.contains(transfer.engine)) {
        count(Tick::kKilled);
        return;  // nobody is left who could be told
    }
    if (is_frozen(*event)) {
        count(Tick::kHeld);
        held_[transfer.engine].push_back(event);
        return;
    }
    const Operation& operation = *transfer.operation;
    const Write& row = operation.rows()[event->row];
    if (killed_.contains(transfer.target->engine_)) {
        count(Tick::kKilled);
        resolve(transfer,
                Error(Scope::kPeer, operation.remote().peer + " is gone; plan again without it",
                      facts_of(operation, row)));
        return;
    }
    // Read now, not when it was posted: a source that changes meanwhile shows.
    const std::span bytes(reinterpret_cast<const std::byte*>(row.source), row.nbytes);
    std::optional<Error> error;
    if (!transfer.target->is_open_) {
        count(Tick::kFenced);
        error.emplace(Scope::kFenced,
                      operation.remote().peer + " fenced or closed its target of generation " +
                          std::to_string(operation.remote().generation) +
                          "; connect to its next one",
                      facts_of(operation, row));
    } else if (event->fate == Fate::kDrop) {
        count(Tick::kDropped);
        error.emplace(Scope::kRail,
                      "the simulated rail dropped a write to " + operation.remote().peer,
                      facts_of(operation, row));
    } else if (event->fate == Fate::kLate) {
        count(Tick::kLate);
        echo(*event, bytes, true);
        error.emplace(Scope::kRail,
                      "the simulated rail lost sight of a write to " + operation.remote().peer +
                          "; it may still land",
                      facts_of(operation, row));
    } else {
        count(Tick::kDelivered);
        if (event->order < newest_delivered_) {
            count(Tick::kReordered);
        }
        newest_delivered_ = std::max(newest_delivered_, event->order);
        if (event->is_duplicated) {
            count(Tick::kDuplicated);
            echo(*event, bytes, false);
        }
        land(*event, bytes);
        if (event->is_resent) {
            resend(*event);
            return;  // the operation goes on until that has landed
        }
    }
    resolve(transfer, std::move(error));
}

void Wire::resend(const Event& event) {
    const SimFaults& faults = faults_of(event.transfer->engine);
    auto second = std::make_shared<Event>(event);
    second->is_resent = false;
    second->rail = (event.rail + 1) % faults.rails;
    second->order = next_order_++;
    second->time = now_ + kLatency_ns + to_ns(faults.late_s * random_.uniform());
    count(Tick::kResent);
    push(std::move(second));
}

void Wire::echo(const Event& event, std::span<const std::byte> bytes, bool is_late) {
    const double late_s = faults_of(event.transfer->engine).late_s;
    auto second = std::make_shared<Event>(event);
    second->is_echo = true;
    second->is_late = is_late;
    second->order = next_order_++;
    second->time = now_ + 1 + to_ns(is_late ? late_s : late_s * random_.uniform());
    second->bytes.assign(bytes.begin(), bytes.end());
    push(std::move(second));
}

void Wire::land(Event& event, std::span<const std::byte> bytes) {
    const Transfer& transfer = *event.transfer;
    SimTarget& target = *transfer.target;
    if (!target.is_open_ || killed_.contains(target.engine_)) {
        count(Tick::kFenced);
        return;
    }
    const Write& row = transfer.operation->rows()[event.row];
    std::size_t hint = 0;
    const Range* range = target.spec_.ranges.find(row.destination, row.nbytes, hint);
    const std::uint64_t address = range->base + (row.destination - range->arena_offset);
    if (event.is_invisible) {
        count(Tick::kInvisible);
        target.invisible_.push_back({address, {bytes.begin(), bytes.end()}});
    } else if (!bytes.empty()) {
        surface(target, address, bytes.size());
        std::memcpy(reinterpret_cast<void*>(address), bytes.data(), bytes.size());
    }
    Tally tally;
    tally.bytes = bytes.size();
    if (row.immediate >= 0) {
        tally.add(target.board_.mark(static_cast<std::uint32_t>(row.immediate)));
    }
    target.board_.account(tally);
}

// What landed earlier at the same place and is not visible yet is never seen after what lands now.
void Wire::surface(SimTarget& target, std::uint64_t address, std::uint64_t nbytes) {
    std::erase_if(target.invisible_, [&](const SimTarget::Invisible& part) {
        if (part.address >= address + nbytes || address >= part.address + part.bytes.size()) {
            return false;
        }
        std::memcpy(reinterpret_cast<void*>(part.address), part.bytes.data(), part.bytes.size());
        count(Tick::kFlushed);
        return true;
    });
}

void Wire::resolve(Transfer& transfer, std::optional<Error> error) noexcept {
    if (error && !transfer.error) {
        transfer.error = std::move(error);
    }
    if (transfer.num_left > 1) {
        --transfer.num_left;
        return;
    }
    transfer.is_over = true;
    transfer.operation->finish(std::move(transfer.error));
}

bool Wire::wait(const std::function<bool()>& ready, const Deadline& deadline) {
    std::unique_lock lock(mutex_);
    const Nanoseconds end =
        is_blocking_ || deadline.is_never() ? UINT64_MAX : now_ + to_ns(deadline.budget_s());
    for (;;) {
        if (ready()) {
            return true;
        }
        if (step_until(end)) {
            continue;
        }
        if (!is_blocking_) {
            // Nothing that could help happens before the deadline.
            now_ = deadline.is_never() ? now_ : std::max(now_, end);
            return false;
        }
        if (deadline.passed()) {
            return false;
        }
        changed_.wait_for(lock, deadline.remaining(kSlice));
        lock.unlock();
        check_interrupt();
        lock.lock();
    }
}

}  // namespace weightsync::sim

namespace weightsync {

std::shared_ptr<SimWire> SimWire::make(std::uint64_t seed, bool is_blocking) {
    return std::make_shared<sim::Wire>(seed, is_blocking);
}

}  // namespace weightsync
