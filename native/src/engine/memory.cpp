#include <weightsync/memory.hpp>

#include <fcntl.h>

#include <string>

#include <weightsync/copy.hpp>
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
        mapping_.populate();
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
    if (is_exposed_) {
        renew(true);
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
        copy.populate();
        copy_bytes(copy.data(), mapping_.data(), mapping_.nbytes());
    }
    mapping_.replace(fresh.get());
    // The pages of the old file go now, not when its last writer wakes up and exits.
    ::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                static_cast<off_t>(mapping_.nbytes()));
    fd_ = std::move(fresh);
    is_exposed_ = false;
    if (is_prefaulted_) {
        mapping_.populate();
    }
}

}  // namespace weightsync
