// One NIC port and the thread that drives all connections over it.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <weightsync/copy.hpp>
#include <weightsync/wait.hpp>

#include "queue_pair.hpp"

namespace weightsync::verbs {

class Rail;

// One end of a connection. All calls come on the rail's thread.
class Link {
  public:
    virtual ~Link() = default;
    // A completion of a request posted with tag(number); any status.
    virtual void on_completion(const ibv_wc& completion, std::uint32_t number) = 0;
    // Whatever can be done now; true when something was. Called every turn of the loop.
    virtual bool advance() = 0;
    // The port went down or came up, or the device failed.
    virtual void on_port(bool is_up) = 0;
};

// What numbers a request on the wire of completions: who posted it, and which it was.
class Tag {
  public:
    static constexpr std::uint32_t kNone = 0;
    explicit Tag(std::uint32_t link = kNone) noexcept : link_(link) {}
    [[nodiscard]] std::uint64_t of(std::uint32_t number) const noexcept {
        return std::uint64_t{link_} << 32 | number;
    }
    [[nodiscard]] std::uint32_t link() const noexcept { return link_; }

  private:
    std::uint32_t link_;
};

// Bytes and states for Engine.rails(); relaxed statistics.
struct RailCounts {
    std::atomic<std::uint64_t> bytes_out{0};
    std::atomic<std::uint64_t> bytes_in{0};
    std::atomic<std::uint64_t> outstanding{0};
    std::atomic<std::uint64_t> wakeups{0};  // of the thread, from sleep
};

class Rail : Counted<Kind::kThread> {
  public:
    // Opens the port and starts the thread.
    Rail(const Table& table, const PortFacts& facts, const PathOptions& options,
         const MemoryOptions& memory, int number);
    ~Rail();
    Rail(const Rail&) = delete;
    Rail& operator=(const Rail&) = delete;

    [[nodiscard]] const std::string& name() const noexcept { return name_; }  // "rxe0:1"
    [[nodiscard]] const Port& port() const noexcept { return port_; }
    [[nodiscard]] const Table& table() const noexcept { return context_->table(); }
    [[nodiscard]] const std::shared_ptr<ProtectionDomain>& domain() const noexcept {
        return domain_;
    }
    [[nodiscard]] bool is_up() const noexcept { return is_up_.load(); }
    [[nodiscard]] RailCounts& counts() noexcept { return counts_; }

    // Run on the rail's thread, soon; any thread, also that one. False once the rail has stopped.
    bool post(std::function<void()> work);
    // The same, and wait for it; rethrows what it throws. Runs in place on the rail's thread and
    // after the rail has stopped.
    void call(const std::function<void()>& work);
    // Have advance() called soon. A system call only while the thread sleeps.
    void wake() noexcept;
    // Ends the thread; idempotent.
    void stop() noexcept;

    // ---- on the rail's thread ----

    // A queue pair on a completion queue that has room for it; makes another one where none has.
    [[nodiscard]] std::unique_ptr<QueuePair> make_queue_pair(QueueSizes sizes);
    [[nodiscard]] Tag attach(std::shared_ptr<Link> link);
    // Completions that come later are dropped.
    void detach(Tag tag) noexcept;
    // Hand out all completions that are there; true when there was something. Not from inside a
    // Link's call but advance(). When a queue has failed the links hear that the port is down.
    bool poll() noexcept;
    // advance() is called again at that time at the latest.
    void wake_by(std::chrono::steady_clock::time_point when) noexcept {
        next_wake_ = std::min(next_wake_, when);
    }

  private:
    struct Place {
        std::uint32_t link = Tag::kNone;
        std::uint32_t uses = 0;
        std::shared_ptr<Link> owner;
    };
    static void run(void* self);
    bool drain(CompletionQueue& queue);
    void loop();
    bool run_work();
    bool advance_all();
    void sleep();
    void read_events() noexcept;
    void set_up(bool is_up) noexcept;
    void break_down(const char* why) noexcept;
    [[nodiscard]] bool is_own_thread() const noexcept {
        return std::this_thread::get_id() == thread_id_.load();
    }

    std::shared_ptr<Context> context_;
    std::shared_ptr<ProtectionDomain> domain_;
    std::shared_ptr<CompletionChannel> channel_;
    Port port_;
    std::string name_;
    RailCounts counts_;
    EventFd event_;
    std::atomic<bool> is_up_{true};
    std::atomic<std::uint32_t> sleeping_{0};
    std::atomic<std::uint32_t> requests_{0};  // wake() since the last turn

    std::mutex mutex_;  // work_, is_stopped_
    std::vector<std::function<void()>> work_;
    bool is_stopping_ = false;
    bool is_stopped_ = false;

    // on the rail's thread
    bool is_broken_ = false;  // a completion queue, or the device, has failed
    std::vector<std::shared_ptr<CompletionQueue>> completions_;
    std::vector<Place> places_;
    std::vector<std::uint32_t> free_places_;
    std::chrono::steady_clock::time_point next_wake_ = std::chrono::steady_clock::time_point::max();

    std::atomic<std::thread::id> thread_id_{};
    std::thread thread_;
};

}  // namespace weightsync::verbs
