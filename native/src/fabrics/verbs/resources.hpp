// What libibverbs hands out, owned. A child holds its parents, so the order in which they are
// dropped cannot be wrong. What the library fails to destroy is reported and stays counted in
// live_object_count().
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include <weightsync/error.hpp>
#include <weightsync/os.hpp>

#include "gpu_memory.hpp"
#include "table.hpp"

namespace weightsync::verbs {

// kRail: the device says no.
[[nodiscard]] Error verbs_error(std::string_view call, int error, std::string_view advice = {},
                                std::source_location where = std::source_location::current());

class Context {
  public:
    // Opens the device of that name. Throws kConfig when there is none, kRail when it fails.
    Context(const Table& table, const std::string& device);
    ~Context();
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;

    [[nodiscard]] const Table& table() const noexcept { return table_; }
    [[nodiscard]] ibv_context* get() const noexcept { return raw_; }
    [[nodiscard]] const std::string& device() const noexcept { return device_; }
    [[nodiscard]] ibv_device_attr query_device() const;
    [[nodiscard]] ibv_port_attr query_port(std::uint8_t port) const;

  private:
    const Table& table_;
    std::string device_;
    ibv_context* raw_ = nullptr;
};

// How memory is registered.
struct MemoryOptions {
    // PCIe may reorder the bytes of writes, which is faster where it matters; nothing overtakes a
    // completion all the same.
    bool relaxed_ordering = true;
    const cuda::Driver* gpu = nullptr;  // for tests; null: cuda::loaded_driver()
    std::string sysfs = "/sys";

    [[nodiscard]] const cuda::Driver* gpu_driver() const {
        return gpu == nullptr ? cuda::loaded_driver() : gpu;
    }
};

class ProtectionDomain {
  public:
    explicit ProtectionDomain(std::shared_ptr<Context> context, MemoryOptions memory = {});
    ~ProtectionDomain();
    ProtectionDomain(const ProtectionDomain&) = delete;
    ProtectionDomain& operator=(const ProtectionDomain&) = delete;

    [[nodiscard]] const Table& table() const noexcept { return context_->table(); }
    [[nodiscard]] const std::shared_ptr<Context>& context() const noexcept { return context_; }
    [[nodiscard]] const MemoryOptions& memory() const noexcept { return memory_; }
    [[nodiscard]] ibv_pd* get() const noexcept { return raw_; }

  private:
    std::shared_ptr<Context> context_;
    MemoryOptions memory_;
    ibv_pd* raw_ = nullptr;
};

// Registered memory of one rail.
class Registration {
  public:
    enum class Access : std::uint8_t { kReadLocally, kWriteRemotely };

    // Pins the pages. Memory of a GPU by a dma-buf, else by its peer memory module. Throws kMemory
    // naming what to check, or what is missing.
    Registration(std::shared_ptr<ProtectionDomain> domain, std::uint64_t address,
                 std::uint64_t nbytes, Access access);
    ~Registration();
    Registration(const Registration&) = delete;
    Registration& operator=(const Registration&) = delete;

    [[nodiscard]] std::uint32_t lkey() const noexcept { return raw_->lkey; }
    [[nodiscard]] std::uint32_t rkey() const noexcept { return raw_->rkey; }

  private:
    struct Request {
        std::uint64_t address = 0;
        std::uint64_t nbytes = 0;
        int access = 0;
    };
    // Null, and errno, when the library refuses.
    [[nodiscard]] ibv_mr* pin(const Request& request) const;
    [[nodiscard]] ibv_mr* pin_dmabuf(const Request& request, DmaBuf& buffer) const;
    [[noreturn]] void refuse(const Request& request, int error, const std::string& no_dmabuf) const;

    std::shared_ptr<ProtectionDomain> domain_;
    ibv_mr* raw_ = nullptr;
};

class CompletionChannel {
  public:
    explicit CompletionChannel(std::shared_ptr<Context> context);
    ~CompletionChannel();
    CompletionChannel(const CompletionChannel&) = delete;
    CompletionChannel& operator=(const CompletionChannel&) = delete;

    [[nodiscard]] const Table& table() const noexcept { return context_->table(); }
    [[nodiscard]] const std::shared_ptr<Context>& context() const noexcept { return context_; }
    [[nodiscard]] ibv_comp_channel* get() const noexcept { return raw_; }
    // Takes all events off the channel, which does not block, and acknowledges them.
    void drain() noexcept;

  private:
    std::shared_ptr<Context> context_;
    ibv_comp_channel* raw_ = nullptr;
};

// With a budget: queue pairs reserve what they can have on it at once, so it cannot overrun.
// Used by one thread.
class CompletionQueue {
  public:
    CompletionQueue(std::shared_ptr<CompletionChannel> channel, std::uint32_t num_entries);
    ~CompletionQueue();
    CompletionQueue(const CompletionQueue&) = delete;
    CompletionQueue& operator=(const CompletionQueue&) = delete;

    [[nodiscard]] ibv_cq* get() const noexcept { return raw_; }
    [[nodiscard]] const Table& table() const noexcept { return channel_->table(); }
    // False when fewer are free.
    [[nodiscard]] bool reserve(std::uint32_t num_entries) noexcept;
    void give_back(std::uint32_t num_entries) noexcept { reserved_ -= num_entries; }
    [[nodiscard]] std::uint32_t reserved() const noexcept { return reserved_; }

    // Number of completions taken; throws kRail when the queue itself has failed.
    [[nodiscard]] int poll(std::span<ibv_wc> completions);
    // Have the channel become readable at the next completion.
    void arm();

  private:
    std::shared_ptr<CompletionChannel> channel_;
    ibv_cq* raw_ = nullptr;
    std::uint32_t reserved_ = 0;
};

}  // namespace weightsync::verbs
