#include <weightsync/memory.hpp>

#include <fcntl.h>

#include <string>

#include <weightsync/error.hpp>
#include <weightsync/ranges.hpp>

namespace weightsync {

namespace {

UniqueFd make_block_fd(std::uint64_t nbytes) {
    if (nbytes == 0 || nbytes > kMaxBytes) {
        throw Error(Scope::kConfig, "cannot allocate " + std::to_string(nbytes) + " bytes");
    }
    return make_memfd("weightsync", file_bytes(nbytes));
}

}  // namespace

Block::Block(std::uint64_t nbytes, bool prefault)
    : nbytes_(nbytes),
      is_prefaulted_(prefault),
      fd_(make_block_fd(nbytes)),
      mapping_(fd_.get(), file_bytes(nbytes)) {
    if (prefault) {
        fill_memfd(fd_.get(), mapping_, nullptr);
        mapping_.populate();
        is_filled_ = true;
    }
}

bool Block::take() {
    {
        const std::lock_guard lock(mutex_);
        if (is_taken_) {
            return false;
        }
        is_taken_ = true;
    }
    try {
        if (is_exposed_) {
            renew(true);
        }
        if (is_prefaulted_ && !is_filled_) {
            mapping_.populate();  // brings missing pages, and leaves what was stored since
            is_filled_ = true;
        }
    } catch (...) {
        give_back();
        throw;
    }
    return true;
}

void Block::give_back() noexcept {
    const std::lock_guard lock(mutex_);
    is_taken_ = false;
}

void Block::renew(bool keep_contents) {
    UniqueFd fresh = make_memfd("weightsync", mapping_.nbytes());
    if (keep_contents) {
        const Mapping copy(fresh.get(), mapping_.nbytes());
        fill_memfd(fresh.get(), copy, mapping_.data());
    }
    mapping_.replace(fresh.get());
    // The pages of the old file go now, not when its last writer wakes up and exits.
    ::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                static_cast<off_t>(mapping_.nbytes()));
    fd_ = std::move(fresh);
    is_exposed_ = false;
    is_filled_ = keep_contents;
    if (keep_contents) {
        mapping_.populate();
    }
}

}  // namespace weightsync
