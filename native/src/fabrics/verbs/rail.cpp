#include "rail.hpp"

#include <poll.h>

#include <algorithm>
#include <array>
#include <condition_variable>

#include "../../net/numa.hpp"

namespace weightsync::verbs {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kBatch = 64;  // completions taken by one call of the library
// One completion queue holds the connections of some dozen peers; more are made as they come.
constexpr std::uint32_t kMaxEntries = 16384;
constexpr std::uint32_t kPlaceBits = 16;
constexpr std::uint32_t kPlaceMask = (1U << kPlaceBits) - 1;

}  // namespace

Rail::Rail(const Table& table, const PortFacts& facts, const PathOptions& options,
           const MemoryOptions& memory, int number)
    : context_(std::make_shared<Context>(table, facts.device)),
      domain_(std::make_shared<ProtectionDomain>(context_, memory)),
      channel_(std::make_shared<CompletionChannel>(context_)),
      port_(open_port(*context_, facts, options)),
      name_(facts.device + ":" + std::to_string(facts.port)) {
    const std::string thread_name = "ws-verbs" + std::to_string(number);
    thread_ = start_thread(thread_name.c_str(), &Rail::run, this);
}

Rail::~Rail() {
    stop();
}

void Rail::run(void* self) {
    auto& rail = *static_cast<Rail*>(self);
    rail.thread_id_.store(std::this_thread::get_id());
    if (rail.port_.facts.numa_node >= 0) {
        net::pin_to_node(rail.port_.facts.numa_node);
    }
    rail.loop();
}

bool Rail::post(std::function<void()> work) {
    {
        const std::lock_guard lock(mutex_);
        if (is_stopped_) {
            return false;
        }
        work_.push_back(std::move(work));
    }
    wake();
    return true;
}

void Rail::call(const std::function<void()>& work) {
    if (is_own_thread()) {
        work();
        return;
    }
    std::mutex mutex;
    std::condition_variable changed;
    bool is_done = false;
    std::exception_ptr failure;
    const bool is_posted = post([&] {
        try {
            work();
        } catch (...) {
            failure = std::current_exception();
        }
        // Notified under the lock: the waiter's frame is gone as soon as it can see is_done.
        const std::lock_guard lock(mutex);
        is_done = true;
        changed.notify_one();
    });
    if (!is_posted) {
        work();  // nobody else uses the rail any more
        return;
    }
    // No deadline: the thread waits for nobody, and what was posted is run before it ends.
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return is_done; });
    if (failure) {
        std::rethrow_exception(failure);
    }
}

void Rail::wake() noexcept {
    requests_.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) != 0) {
        event_.signal();
    }
}

void Rail::stop() noexcept {
    {
        const std::lock_guard lock(mutex_);
        is_stopping_ = true;
    }
    wake();
    if (thread_.joinable()) {
        thread_.join();
    }
    places_.clear();
    completions_.clear();
}

std::unique_ptr<QueuePair> Rail::make_queue_pair(QueueSizes sizes) {
    const auto limit = static_cast<std::uint32_t>(std::max(port_.device.max_qp_wr, 1));
    sizes.num_sends = std::min(sizes.num_sends, limit);
    sizes.num_receives = std::min(sizes.num_receives, limit);
    const auto has_room = [&](const std::shared_ptr<CompletionQueue>& queue) {
        const bool is_reserved = queue->reserve(sizes.total());
        if (is_reserved) {
            queue->give_back(sizes.total());
        }
        return is_reserved;
    };
    auto found = std::ranges::find_if(completions_, has_room);
    if (found == completions_.end()) {
        const auto most = static_cast<std::uint32_t>(std::max(port_.device.max_cqe, 1));
        const std::uint32_t entries = std::min(std::max(kMaxEntries, sizes.total()), most);
        auto queue = std::make_shared<CompletionQueue>(channel_, entries);
        if (!has_room(queue)) {
            throw Error(Scope::kRail,
                        name_ + ": a completion queue of this device holds too few entries (" +
                            std::to_string(queue->get()->cqe) + " of " +
                            std::to_string(sizes.total()) + ")",
                        {{"rail", name_}});
        }
        completions_.push_back(std::move(queue));
        found = completions_.end() - 1;
    }
    return std::make_unique<QueuePair>(domain_, *found, port_, sizes);
}

Tag Rail::attach(std::shared_ptr<Link> link) {
    if (free_places_.empty()) {
        if (places_.size() > kPlaceMask) {
            throw Error(Scope::kRail, name_ + ": more than 65536 connections", {{"rail", name_}});
        }
        places_.emplace_back();
        free_places_.push_back(static_cast<std::uint32_t>(places_.size() - 1));
    }
    const std::uint32_t index = free_places_.back();
    free_places_.pop_back();
    Place& place = places_[index];
    // Completions of whoever had the place before carry another number.
    place.uses = place.uses % (kPlaceMask - 1) + 1;
    place.link = place.uses << kPlaceBits | index;
    place.owner = std::move(link);
    return Tag(place.link);
}

void Rail::detach(Tag tag) noexcept {
    const std::uint32_t index = tag.link() & kPlaceMask;
    if (tag.link() != Tag::kNone && index < places_.size() && places_[index].link == tag.link()) {
        places_[index].link = Tag::kNone;
        places_[index].owner.reset();
        free_places_.push_back(index);
    }
}

bool Rail::drain(CompletionQueue& queue) {
    std::array<ibv_wc, kBatch> batch;
    bool is_busy = false;
    int count = kBatch;
    while (count == kBatch) {  // fewer: it is empty
        count = queue.poll(batch);
        for (int i = 0; i < count; ++i) {
            const ibv_wc& completion = batch[static_cast<std::size_t>(i)];
            const auto link = static_cast<std::uint32_t>(completion.wr_id >> 32);
            const std::uint32_t index = link & kPlaceMask;
            if (index < places_.size() && places_[index].link == link) {
                places_[index].owner->on_completion(completion,
                                                    static_cast<std::uint32_t>(completion.wr_id));
            }
        }
        is_busy = is_busy || count > 0;
    }
    return is_busy;
}

bool Rail::poll() noexcept {
    bool is_busy = false;
    try {
        for (std::size_t i = 0; i < completions_.size() && !is_broken_; ++i) {
            is_busy = drain(*completions_[i]) || is_busy;
        }
    } catch (const std::exception& error) {
        break_down(error.what());
        is_busy = true;
    }
    return is_busy;
}

bool Rail::run_work() {
    std::vector<std::function<void()>> work;
    {
        const std::lock_guard lock(mutex_);
        work.swap(work_);
    }
    for (const auto& one : work) {
        one();
    }
    return !work.empty();
}

bool Rail::advance_all() {
    bool is_busy = false;
    // By index: a link may attach or detach others, or itself.
    for (std::size_t i = 0; i < places_.size(); ++i) {
        if (places_[i].link != Tag::kNone) {
            const std::shared_ptr<Link> link = places_[i].owner;
            is_busy = link->advance() || is_busy;
        }
    }
    return is_busy;
}

void Rail::set_up(bool is_up) noexcept {
    if ((is_up && is_broken_) || is_up_.exchange(is_up) == is_up) {
        return;
    }
    for (std::size_t i = 0; i < places_.size(); ++i) {
        if (places_[i].link != Tag::kNone) {
            const std::shared_ptr<Link> link = places_[i].owner;
            link->on_port(is_up);
        }
    }
}

// For good: queues and devices that have failed do not come back.
void Rail::break_down(const char* why) noexcept {
    is_broken_ = true;
    report("verbs fabric: rail " + name_ + " is lost until the engine is opened again: " + why);
    set_up(false);
}

void Rail::read_events() noexcept {
    ibv_async_event event{};
    while (table().get_async_event(context_->get(), &event) == 0) {
        const ibv_event_type type = event.event_type;
        const int port = event.element.port_num;
        table().ack_async_event(&event);
        if (type == IBV_EVENT_DEVICE_FATAL || type == IBV_EVENT_CQ_ERR) {
            break_down(type == IBV_EVENT_CQ_ERR ? "its completion queue failed"
                                                : "the device failed");
        } else if (type == IBV_EVENT_PORT_ERR && port == port_.number) {
            set_up(false);
        } else if (type == IBV_EVENT_PORT_ACTIVE && port == port_.number) {
            set_up(true);
        }
        // Events of queue pairs come as failed completions too.
    }
}

void Rail::sleep() {
    const auto now = Clock::now();
    int timeout_ms = -1;
    if (next_wake_ != Clock::time_point::max()) {
        const auto left = std::chrono::ceil<std::chrono::milliseconds>(next_wake_ - now);
        timeout_ms = static_cast<int>(std::clamp<std::int64_t>(left.count(), 0, 60'000));
    }
    std::array<pollfd, 3> fds = {{{channel_->get()->fd, POLLIN, 0},
                                  {event_.get(), POLLIN, 0},
                                  {context_->get()->async_fd, POLLIN, 0}}};
    ::poll(fds.data(), fds.size(), timeout_ms);
    counts_.wakeups.fetch_add(1, std::memory_order_relaxed);
    if ((fds[0].revents & POLLIN) != 0) {
        channel_->drain();
    }
    if ((fds[1].revents & POLLIN) != 0) {
        event_.drain();
    }
    if ((fds[2].revents & POLLIN) != 0) {
        read_events();
    }
}

void Rail::loop() {
    auto idle_since = Clock::now();
    for (;;) {
        const std::uint32_t seen = requests_.load(std::memory_order_seq_cst);
        bool is_busy = run_work();
        next_wake_ = Clock::time_point::max();
        is_busy = poll() || is_busy;
        try {
            is_busy = advance_all() || is_busy;
        } catch (const std::exception& error) {
            break_down(error.what());
        }
        const auto now = Clock::now();
        if (is_busy) {
            idle_since = now;
            continue;
        }
        {
            const std::lock_guard lock(mutex_);
            if (is_stopping_ && work_.empty()) {
                is_stopped_ = true;
                return;
            }
        }
        if (now - idle_since < kSpin && now < next_wake_) {
            cpu_relax();
            continue;
        }
        // Whoever calls wake() either sees that we sleep, or is seen here.
        sleeping_.store(1, std::memory_order_seq_cst);
        bool is_quiet = requests_.load(std::memory_order_seq_cst) == seen;
        try {
            for (std::size_t i = 0; i < completions_.size() && !is_broken_; ++i) {
                completions_[i]->arm();
            }
        } catch (const std::exception& error) {
            break_down(error.what());
            is_quiet = false;
        }
        // What completed before the arming raises no event.
        is_quiet = is_quiet && !poll();
        if (is_quiet) {
            sleep();
        }
        sleeping_.store(0, std::memory_order_seq_cst);
        idle_since = Clock::now();
    }
}

}  // namespace weightsync::verbs
