// Memory of a sink that other processes can write: one memfd, mapped here, handed out to sources.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include <weightsync/os.hpp>

namespace weightsync {

class Block : Counted<Kind::kBlock> {
  public:
    // Zeroed memory. With `prefault` every page is present on return, else a full machine shows as
    // an error only while a source connects. Throws kMemory.
    Block(std::uint64_t nbytes, bool prefault);

    [[nodiscard]] std::byte* data() const noexcept { return mapping_.data(); }
    [[nodiscard]] std::uint64_t nbytes() const noexcept { return nbytes_; }
    [[nodiscard]] std::uint64_t mapped_nbytes() const noexcept { return mapping_.nbytes(); }
    // The current file; borrowed, valid until the next renew().
    [[nodiscard]] int fd() const noexcept { return fd_.get(); }

    // Take for one open target, so that renewing cannot cut off the writers of another; false when
    // taken. A block whose file some process may still hold is renewed first.
    [[nodiscard]] bool take();
    void give_back() noexcept;
    // A process got the file: it can write until the next renew().
    void set_exposed() noexcept { is_exposed_ = true; }

    // Leave the file to whoever still writes it and go on with a new one at the same address. With
    // keep_contents the bytes are copied, else they read as zero and the pages come with take().
    void renew(bool keep_contents);

  private:
    std::uint64_t nbytes_;
    const bool is_prefaulted_;
    bool is_filled_ = false;
    UniqueFd fd_;
    Mapping mapping_;
    std::mutex mutex_;
    bool is_taken_ = false;
    std::atomic<bool> is_exposed_{false};
};

}  // namespace weightsync
