// Owners of libfabric's objects. Each holds what it was made from, so the order in which they are
// dropped cannot be wrong, and each is counted.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weightsync/live.hpp>

#include "library.hpp"

namespace weightsync::ofi {

// Closes without throwing; a failure is reported with `what`.
void close_fid(abi::fid& object, const char* what) noexcept;

// One object of libfabric.
template <class Object>
class Fid {
  public:
    Fid() noexcept = default;
    Fid(Object* object, const char* what) noexcept : object_(object), what_(what) {
        count_live(Kind::kFid, 1);
    }
    Fid(Fid&& other) noexcept
        : object_(std::exchange(other.object_, nullptr)), what_(other.what_) {}
    Fid& operator=(Fid&& other) noexcept {
        if (this != &other) {
            reset();
            object_ = std::exchange(other.object_, nullptr);
            what_ = other.what_;
        }
        return *this;
    }
    Fid(const Fid&) = delete;
    Fid& operator=(const Fid&) = delete;
    ~Fid() { reset(); }

    void reset() noexcept {
        if (Object* object = std::exchange(object_, nullptr)) {
            close_fid(object->base, what_);
            count_live(Kind::kFid, -1);
        }
    }
    [[nodiscard]] Object* get() const noexcept { return object_; }
    [[nodiscard]] Object* operator->() const noexcept { return object_; }
    [[nodiscard]] explicit operator bool() const noexcept { return object_ != nullptr; }

  private:
    Object* object_ = nullptr;
    const char* what_ = "";
};

// One NIC, or one address of a software provider. Thread-safe.
class Domain {
  public:
    explicit Domain(Info info);

    [[nodiscard]] const std::string& provider() const noexcept { return provider_; }
    // "tcp 127.0.0.1", for messages.
    [[nodiscard]] const std::string& label() const noexcept { return label_; }
    [[nodiscard]] std::string name() const;
    [[nodiscard]] abi::fid_fabric* fabric() const noexcept { return fabric_.get(); }
    [[nodiscard]] abi::fid_domain* get() const noexcept { return domain_.get(); }
    [[nodiscard]] abi::fi_info* info() const noexcept { return info_.get(); }

    // What the provider asks for.
    [[nodiscard]] bool needs_local_regions() const noexcept { return has(abi::FI_MR_LOCAL); }
    [[nodiscard]] bool uses_addresses() const noexcept { return has(abi::FI_MR_VIRT_ADDR); }
    [[nodiscard]] bool chooses_keys() const noexcept { return has(abi::FI_MR_PROV_KEY); }
    [[nodiscard]] bool binds_regions() const noexcept { return has(abi::FI_MR_ENDPOINT); }
    [[nodiscard]] std::uint64_t max_message_bytes() const noexcept {
        return info_->ep_attr->max_msg_size;
    }
    // Writes in flight on one endpoint.
    [[nodiscard]] std::size_t max_writes() const noexcept { return info_->tx_attr->size; }
    // Complete means that the bytes are at the sink and no copy of them is on its way.
    [[nodiscard]] std::uint64_t write_flags() const noexcept {
        return abi::FI_COMPLETION | abi::FI_DELIVERY_COMPLETE;
    }

  private:
    [[nodiscard]] bool has(int mode) const noexcept {
        return (info_->domain_attr->mr_mode & mode) != 0;
    }
    Info info_;
    std::string provider_;
    std::string label_;
    Fid<abi::fid_fabric> fabric_;
    Fid<abi::fid_domain> domain_;
};

class Endpoint;

// Registered memory.
class Region {
  public:
    Region(std::shared_ptr<Domain> domain, std::uint64_t address, std::uint64_t nbytes,
           std::uint64_t access);
    // For a provider that binds_regions(), before anybody uses it.
    void bind(const Endpoint& endpoint) const;
    [[nodiscard]] std::uint64_t key() const noexcept { return region_->key; }
    [[nodiscard]] void* desc() const noexcept { return region_->mem_desc; }

  private:
    std::shared_ptr<Domain> domain_;
    Fid<abi::fid_mr> region_;
};

// What a completion queue had to say about a write that failed.
struct CompletionError {
    void* context = nullptr;
    int error = 0;
    std::string text;
};

// An endpoint with a completion queue and an address vector of its own, so that closing it takes
// back all that was posted, and an arrival tells by its queue whose it is. Not thread-safe but for
// lock(): hold it around every other call.
class Endpoint {
  public:
    // Tries for so long. Not a timed mutex: thread sanitizers do not see it lock.
    [[nodiscard]] std::unique_lock<std::mutex> lock_within(std::chrono::milliseconds patience);

    Endpoint(std::shared_ptr<Domain> domain, std::size_t num_entries);
    ~Endpoint() { close(); }
    Endpoint(const Endpoint&) = delete;
    Endpoint& operator=(const Endpoint&) = delete;

    [[nodiscard]] std::mutex& mutex() noexcept { return mutex_; }
    [[nodiscard]] const std::shared_ptr<Domain>& domain() const noexcept { return domain_; }
    [[nodiscard]] bool is_open() const noexcept { return static_cast<bool>(queue_); }
    [[nodiscard]] abi::fid_ep* get() const noexcept { return endpoint_.get(); }
    // What a peer inserts.
    [[nodiscard]] const std::vector<std::byte>& name() const noexcept { return name_; }
    // True while an endpoint of that name is open in this process.
    [[nodiscard]] static bool is_open_here(std::span<const std::byte> name);
    // Throws kPeer.
    [[nodiscard]] abi::fi_addr_t insert(std::span<const std::byte> name) const;

    // Completions, at most entries.size(); 0 when there is none, -FI_EAVAIL when next_error() has
    // something to say, another negative number when the queue is broken.
    [[nodiscard]] ssize_t poll(std::span<abi::fi_cq_data_entry> entries) const noexcept;
    [[nodiscard]] std::optional<CompletionError> next_error() const;
    // 0, -EAGAIN when it must be tried again after a poll, or another error.
    [[nodiscard]] ssize_t write(const abi::fi_msg_rma& message,
                                std::uint64_t flags) const noexcept {
        return endpoint_->rma->writemsg(endpoint_.get(), &message, flags);
    }

    // Becomes readable with completions and with work for poll(), or -1: then only polling helps.
    [[nodiscard]] int wait_fd() const noexcept { return wait_fd_; }
    // False: poll again before waiting for wait_fd().
    [[nodiscard]] bool may_sleep() const noexcept;

    // Nothing that was posted touches memory any more, here or by peers; poll() still gives what
    // had completed.
    void stop() noexcept;
    // stop(), and no completion comes.
    void close() noexcept;

  private:
    [[nodiscard]] Fid<abi::fid_cq> open_queue(std::size_t num_entries);
    void set_options() const;

    std::shared_ptr<Domain> domain_;
    std::mutex mutex_;
    int wait_fd_ = -1;
    // Closed in reverse.
    Fid<abi::fid_av> addresses_;
    Fid<abi::fid_cq> queue_;
    Fid<abi::fid_ep> endpoint_;
    std::vector<std::byte> name_;
};

}  // namespace weightsync::ofi
