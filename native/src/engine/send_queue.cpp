#include <weightsync/send_queue.hpp>

#include <algorithm>
#include <atomic>
#include <utility>

namespace weightsync {

namespace {

// One more path is woken for every so many bytes that wait, or for what a path sends at once: a
// short queue is for one path alone.
constexpr std::uint64_t kBytesPerWake = std::uint64_t{1} << 20;

// The queues of a process begin with different paths, so that those that begin together do not all
// take the same rail.
std::size_t first_wake(std::size_t num_paths) noexcept {
    static std::atomic<std::size_t> count{0};
    return num_paths == 0 ? 0 : count++ % num_paths;
}

// 0 is left out, so that no id is 0.
constexpr std::uint32_t next_tag(std::uint32_t tag) noexcept {
    return tag + 1 == 0 ? 1 : tag + 1;
}

constexpr std::uint64_t to_id(std::uint32_t index, std::uint32_t tag) noexcept {
    return std::uint64_t{tag} << 32U | index;
}

}  // namespace

struct SendQueue::Effects {
    std::vector<Finished> finished;
    std::vector<std::size_t> wakes;
};

SendQueue::SendQueue(std::size_t num_paths, std::uint64_t max_piece_bytes, Wake wake)
    : max_piece_bytes_(max_piece_bytes),
      wake_(std::move(wake)),
      paths_(num_paths),
      next_wake_(first_wake(num_paths)),
      cursor_(entries_.end()) {
    if (max_piece_bytes == 0 || num_paths == 0) {
        throw Error(Scope::kInternal, "a queue without paths, or with pieces of no bytes");
    }
}

void SendQueue::push(std::shared_ptr<Operation> operation) {
    Effects effects;
    {
        const std::lock_guard lock(mutex_);
        if (error_) {
            effects.finished.push_back({std::move(operation), *error_});
        } else if (operation->rows().empty()) {
            effects.finished.push_back({std::move(operation), std::nullopt});
        } else {
            pending_bytes_ += operation->nbytes();
            Entry entry;
            entry.rows_left = operation->rows().size();
            entry.operation = std::move(operation);
            entries_.push_back(std::move(entry));
            if (cursor_ == entries_.end()) {
                cursor_ = std::prev(entries_.end());
            }
            choose_wakes(effects);
        }
    }
    apply(effects);
}

std::size_t SendQueue::take(std::size_t path, std::uint64_t max_bytes, std::span<Piece> pieces) {
    const std::lock_guard lock(mutex_);
    std::size_t count = 0;
    std::uint64_t total = 0;
    paths_[path].is_woken = false;
    max_bytes = std::min(max_bytes, share_of_pending());
    while (count < pieces.size()) {
        if (ready_.empty()) {
            const std::uint32_t index = cut();
            if (index == kNone) {
                break;
            }
            ready_.push_back(index);
        }
        const std::uint32_t index = ready_.front();
        const std::uint64_t nbytes = slots_[index].piece.nbytes;
        if (count != 0 && nbytes > max_bytes - std::min(total, max_bytes)) {
            break;
        }
        ready_.pop_front();
        link(index, path);
        pending_bytes_ -= nbytes;
        total += nbytes;
        pieces[count++] = slots_[index].piece;
    }
    paths_[path].is_idle = count == 0;
    return count;
}

// Paths that were woken and have not come yet get as much as the one that is here.
std::uint64_t SendQueue::share_of_pending() const {
    const auto is_woken = [](const Path& path) { return path.is_woken; };
    const auto others = static_cast<std::uint64_t>(std::ranges::count_if(paths_, is_woken));
    return (pending_bytes_ + others) / (others + 1);
}

// The next piece of the rows that nobody took, as a slot that no path holds.
std::uint32_t SendQueue::cut() {
    if (cursor_ == entries_.end()) {
        return kNone;
    }
    Entry& entry = *cursor_;
    const Write& row = entry.operation->rows()[entry.next_row];
    const std::uint32_t index = new_slot();
    Slot& slot = slots_[index];
    slot.entry = cursor_;
    slot.piece.source = row.source + entry.next_offset;
    slot.piece.destination = row.destination + entry.next_offset;
    slot.piece.nbytes = std::min(row.nbytes - entry.next_offset, max_piece_bytes_);
    slot.piece.immediate = kNoImmediate;
    if (row.nbytes <= max_piece_bytes_) {
        slot.piece.immediate = row.immediate;
        slot.is_row = true;
        ++entry.next_row;
    } else {
        if (entry.split == kNone) {
            if (free_splits_.empty()) {
                free_splits_.push_back(static_cast<std::uint32_t>(splits_.size()));
                splits_.emplace_back();
            }
            entry.split = free_splits_.back();
            free_splits_.pop_back();
            Split& split = splits_[entry.split];
            split.pieces_left = (row.nbytes + max_piece_bytes_ - 1) / max_piece_bytes_;
            split.has_last = row.immediate != kNoImmediate;
            if (split.has_last) {
                --split.pieces_left;
                const std::uint64_t before = split.pieces_left * max_piece_bytes_;
                split.last = {row.source + before, row.destination + before, row.nbytes - before,
                              row.immediate, 0};
            }
        }
        slot.split = entry.split;
        entry.next_offset += slot.piece.nbytes;
        const std::uint64_t last = splits_[entry.split].has_last
                                       ? splits_[entry.split].last.source - row.source
                                       : row.nbytes;
        if (entry.next_offset == last) {
            entry.split = kNone;
            entry.next_offset = 0;
            ++entry.next_row;
        }
    }
    if (entry.next_row == entry.operation->rows().size()) {
        ++cursor_;
    }
    return index;
}

void SendQueue::complete(std::size_t path, std::span<const std::uint64_t> ids) {
    Effects effects;
    {
        const std::lock_guard lock(mutex_);
        const bool had_work = !ready_.empty();
        for (const std::uint64_t id : ids) {
            const auto index = static_cast<std::uint32_t>(id);
            if (index < slots_.size() && slots_[index].piece.id == id &&
                slots_[index].path == path) {
                complete_slot(index, effects);
            }
        }
        if (!had_work && !ready_.empty()) {
            choose_wakes(effects);  // the last piece of a row may go now
        }
    }
    apply(effects);
}

void SendQueue::complete_slot(std::uint32_t index, Effects& effects) {
    unlink(index);
    const Slot slot = slots_[index];
    free_slot(index);
    if (slot.is_row) {
        --slot.entry->rows_left;
    } else if (--splits_[slot.split].pieces_left == 0) {
        const Split split = splits_[slot.split];
        free_splits_.push_back(slot.split);
        if (!split.has_last) {
            --slot.entry->rows_left;
        } else if (!error_) {
            const std::uint32_t last = new_slot();
            const std::uint64_t id = slots_[last].piece.id;
            slots_[last].piece = split.last;
            slots_[last].piece.id = id;
            slots_[last].entry = slot.entry;
            slots_[last].is_row = true;
            ready_.push_front(last);  // it completes a row: before new ones begin
        }
    }
    settle(slot.entry, effects);
}

// Finishes an operation that is complete, or that failed and is held by nobody.
void SendQueue::settle(Entries::iterator entry, Effects& effects) {
    if (entry->rows_left == 0) {
        effects.finished.push_back({std::move(entry->operation), std::nullopt});
    } else if (error_ && entry->num_held == 0) {
        effects.finished.push_back({std::move(entry->operation), *error_});
    } else {
        return;
    }
    entries_.erase(entry);
}

void SendQueue::leave(std::size_t path) {
    Effects effects;
    {
        const std::lock_guard lock(mutex_);
        paths_[path].is_idle = false;
        paths_[path].is_woken = false;
        choose_wakes(effects);  // it may have been the one that was woken
    }
    apply(effects);
}

void SendQueue::give_back(std::size_t path) {
    Effects effects;
    {
        const std::lock_guard lock(mutex_);
        paths_[path].is_idle = false;
        paths_[path].is_woken = false;
        while (paths_[path].first != kNone) {
            const std::uint32_t index = paths_[path].first;
            unlink(index);
            const Entries::iterator entry = slots_[index].entry;
            if (error_) {
                free_slot(index);
                settle(entry, effects);
                continue;
            }
            // Another id, so that a completion that comes late is not taken for the new attempt's.
            slots_[index].tag = next_tag(slots_[index].tag);
            slots_[index].piece.id = to_id(index, slots_[index].tag);
            pending_bytes_ += slots_[index].piece.nbytes;
            ready_.push_back(index);
        }
        choose_wakes(effects);
    }
    apply(effects);
}

void SendQueue::fail(const Error& error) {
    Effects effects;
    {
        const std::lock_guard lock(mutex_);
        if (error_) {
            return;
        }
        error_ = error;
        drop_ready();
        cursor_ = entries_.end();
        for (auto entry = entries_.begin(); entry != entries_.end();) {
            settle(entry++, effects);
        }
    }
    apply(effects);
}

void SendQueue::drop_ready() {
    for (const std::uint32_t index : ready_) {
        free_slot(index);
    }
    ready_.clear();
    pending_bytes_ = 0;
}

std::uint32_t SendQueue::new_slot() {
    if (free_slots_.empty()) {
        free_slots_.push_back(static_cast<std::uint32_t>(slots_.size()));
        slots_.emplace_back();
    }
    const std::uint32_t index = free_slots_.back();
    free_slots_.pop_back();
    const std::uint32_t tag = next_tag(slots_[index].tag);
    slots_[index] = Slot{};
    slots_[index].tag = tag;
    slots_[index].piece.id = to_id(index, tag);
    return index;
}

void SendQueue::free_slot(std::uint32_t index) {
    slots_[index].piece.id = 0;
    free_slots_.push_back(index);
}

void SendQueue::link(std::uint32_t index, std::size_t path) {
    Slot& slot = slots_[index];
    Path& to = paths_[path];
    slot.path = static_cast<std::uint32_t>(path);
    slot.previous = kNone;
    slot.next = to.first;
    if (to.first != kNone) {
        slots_[to.first].previous = index;
    }
    to.first = index;
    to.outstanding += slot.piece.nbytes;
    ++slot.entry->num_held;
}

void SendQueue::unlink(std::uint32_t index) {
    Slot& slot = slots_[index];
    Path& from = paths_[slot.path];
    (slot.previous == kNone ? from.first : slots_[slot.previous].next) = slot.next;
    if (slot.next != kNone) {
        slots_[slot.next].previous = slot.previous;
    }
    from.outstanding -= slot.piece.nbytes;
    --slot.entry->num_held;
    slot.path = kNone;
}

// Idle paths for what waits, the least loaded first; equals take turns, so that work which comes in
// pieces too small to share does not always go over the first rail.
void SendQueue::choose_wakes(Effects& effects) {
    if (error_ || (ready_.empty() && cursor_ == entries_.end())) {
        return;
    }
    const std::uint64_t wanted = 1 + pending_bytes_ / std::min(kBytesPerWake, max_piece_bytes_);
    while (effects.wakes.size() < wanted) {
        std::size_t best = paths_.size();
        for (std::size_t i = 0; i < paths_.size(); ++i) {
            const std::size_t path = (next_wake_ + i) % paths_.size();
            if (paths_[path].is_idle &&
                (best == paths_.size() || paths_[path].outstanding < paths_[best].outstanding)) {
                best = path;
            }
        }
        if (best == paths_.size()) {
            return;
        }
        paths_[best].is_idle = false;
        paths_[best].is_woken = true;
        next_wake_ = (best + 1) % paths_.size();
        effects.wakes.push_back(best);
    }
}

void SendQueue::apply(Effects& effects) {
    for (const std::size_t path : effects.wakes) {
        wake_(path);
    }
    for (Finished& finished : effects.finished) {
        finished.operation->finish(std::move(finished.error));
    }
}

std::uint64_t SendQueue::outstanding_bytes(std::size_t path) const {
    const std::lock_guard lock(mutex_);
    return paths_[path].outstanding;
}

std::uint64_t SendQueue::pending_bytes() const {
    const std::lock_guard lock(mutex_);
    return pending_bytes_;
}

bool SendQueue::is_failed() const {
    const std::lock_guard lock(mutex_);
    return error_.has_value();
}

}  // namespace weightsync
