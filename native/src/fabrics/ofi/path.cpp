#include <algorithm>
#include <cerrno>
#include <thread>
#include <utility>

#include "remote.hpp"

namespace weightsync::ofi {

using namespace std::chrono_literals;

namespace {

// Writes in flight on a path, and their bytes: enough for the product of bandwidth and delay, small
// enough that rails share the work by their speed.
constexpr std::size_t kMaxWrites = 256;
constexpr std::uint64_t kWindowBytes = std::uint64_t{16} << 20;
// Pieces taken and posted between two polls.
constexpr std::size_t kMaxSubmit = 32;
constexpr int kBatchesPerTurn = 8;
constexpr std::chrono::milliseconds kClosePatience = 200ms;
// A sink in this process answers within one poll, unless it is closed just now.
constexpr double kDrainS = 1.0;
// No write completes for so long: longer than a large one takes over a slow network.
constexpr std::chrono::seconds kStall{4};
constexpr std::chrono::seconds kAskAgain{1};

std::size_t num_slots(const Domain& domain) {
    return std::clamp<std::size_t>(domain.max_writes(), 1, kMaxWrites);
}

}  // namespace

SourcePath::SourcePath(PathSpec spec, std::weak_ptr<OfiRemote> remote,
                       std::shared_ptr<Outbox> outbox)
    : index_(spec.index),
      number_(spec.number),
      rail_(std::move(spec.rail)),
      sink_(std::move(spec.sink)),
      peer_label_(std::move(spec.peer)),
      rail_label_(rail_->domain()->label()),
      remote_(std::move(remote)),
      outbox_(std::move(outbox)),
      data_bytes_(std::min<std::uint64_t>(sink_->data_bytes,
                                          rail_->domain()->info()->domain_attr->cq_data_size)),
      endpoint_(rail_->domain(), 2 * num_slots(*rail_->domain())),
      slots_(num_slots(*rail_->domain())),
      is_sink_here_(rail_->domain()->provider() == "shm" && Endpoint::is_open_here(sink_->name)),
      pieces_(kMaxSubmit) {
    peer_ = endpoint_.insert(sink_->name);
    if (outbox_->memory != nullptr) {
        memory_.emplace(outbox_->memory, spec.rail_index);
    }
    if (rail_->domain()->needs_local_regions()) {
        zeros_region_ = std::make_unique<Region>(rail_->domain(),
                                                 reinterpret_cast<std::uint64_t>(zeros_.data()),
                                                 zeros_.size(), abi::FI_WRITE);
        if (rail_->domain()->binds_regions()) {
            zeros_region_->bind(endpoint_);
        }
    }
    for (Slot& slot : slots_) {
        free_slots_.push_back(&slot);
    }
    outbox_->has_work[index_].store(true);
}

bool SourcePath::progress() noexcept {
    if (is_closed_) {
        return false;
    }
    bool has_moved = outbox_->has_work[index_].exchange(false, std::memory_order_seq_cst);
    bool has_reaped = false;
    std::array<std::uint64_t, kBatch> done;
    for (int batch = 0; batch < kBatchesPerTurn; ++batch) {
        std::size_t num_done = 0;
        {
            const std::unique_lock lock(endpoint_.mutex(), std::try_to_lock);
            if (!lock || !endpoint_.is_open() || is_closing_ || !reap(done, num_done)) {
                break;
            }
        }
        has_reaped = true;
        // Without the lock: operations finish in there.
        outbox_->queue->complete(index_, std::span(done).first(num_done));
    }
    has_moved |= has_reaped;
    auto news = OfiRemote::News::kProven;
    bool has_news = false;
    std::optional<Error> failure;
    {
        const std::unique_lock lock(endpoint_.mutex(), std::try_to_lock);
        if (!lock || !endpoint_.is_open()) {
            return false;
        }
        if (!is_closing_ && !failure_) {
            look_for_stall(has_reaped);
        }
        if (!is_closing_ && !failure_) {
            has_moved |= post_all();
        }
        if (failure_ && !is_reported_) {
            is_reported_ = true;
            failure = failure_;
        }
        // In the sink's own process its provider may still answer: see drain().
        if (is_closing_ || (failure && !is_sink_here_)) {
            // Here and nowhere else while the remote lives: what was completed above is known to
            // the queue before anything is sent again.
            close_locked();
            has_news = true;
            news = OfiRemote::News::kClosed;
        }
        if (failure) {
            has_news = true;
            news = is_ours_ ? OfiRemote::News::kFatal : OfiRemote::News::kFailed;
        } else if (has_news) {
            // that it was closed
        } else if (is_proven_ && !std::exchange(is_told_, true)) {
            has_news = true;
        } else if (std::exchange(is_stalled_, false)) {
            has_news = true;
            news = OfiRemote::News::kStalled;
        }
    }
    if (is_closed_) {
        rail_->remove(*this);
        give_back_if_over();
    }
    if (has_news) {
        if (const auto remote = remote_.lock()) {
            remote->tell(index_, number_, news, std::move(failure));
        }
    }
    return has_moved;
}

void SourcePath::look_for_stall(bool has_reaped) {
    if (has_reaped || free_slots_.size() == slots_.size()) {
        moved_time_ = {};
        is_condemned_ = false;
        return;
    }
    const Clock::time_point now = Clock::now();
    if (moved_time_ == Clock::time_point{}) {
        moved_time_ = now;
        asked_time_ = now;
    } else if (now - moved_time_ > kStall) {
        if (is_condemned_.exchange(false)) {
            fail_write("nothing moves, while the peer answers another way");
        } else if (now - asked_time_ > kAskAgain) {
            asked_time_ = now;
            is_stalled_ = true;
        }
    }
}

bool SourcePath::reap(std::array<std::uint64_t, kBatch>& done, std::size_t& num_done) {
    std::array<abi::fi_cq_data_entry, kBatch> entries;
    const ssize_t count = endpoint_.poll(entries);
    if (count == -abi::FI_EAVAIL) {
        const auto error = endpoint_.next_error();
        fail_write(error ? error->text : "a write failed");
        return true;
    }
    if (count < 0) {
        fail_write(std::string("the completion queue is broken: ") +
                   library().strerror(static_cast<int>(-count)));
        return false;
    }
    for (const auto& entry : std::span(entries).first(static_cast<std::size_t>(count))) {
        auto* slot = static_cast<Slot*>(entry.op_context);
        if (slot == nullptr) {
            continue;
        }
        if (slot->id != 0) {
            done[num_done++] = std::exchange(slot->id, 0);
            rail_->bytes_done.fetch_add(slot->nbytes, std::memory_order_relaxed);  // a statistic
        } else {
            is_proven_ = true;
        }
        free_slots_.push_back(slot);
        is_blocked_ = false;
    }
    return count > 0;
}

void SourcePath::fail_write(const std::string& text) {
    if (failure_ || is_closing_) {
        return;
    }
    failure_.emplace(Scope::kRail,
                     "a write to " + peer_label_ + " over rail " + rail_label_ +
                         " failed: " + text + "; what was in flight may or may not have landed",
                     Facts{{"peer", peer_label_}, {"rail", rail_label_}});
    outbox_->queue->leave(index_);
}

bool SourcePath::post_all() {
    if (is_draining_) {
        return false;
    }
    if (!is_probed_) {
        return post_probe();
    }
    if (!is_proven_) {
        return false;
    }
    bool has_moved = false;
    for (;;) {
        if (next_piece_ == num_pieces_) {
            const std::uint64_t outstanding = outbox_->queue->outstanding_bytes(index_);
            if (outstanding >= kWindowBytes || free_slots_.empty()) {
                return has_moved;
            }
            next_piece_ = 0;
            num_pieces_ = outbox_->queue->take(
                index_, kWindowBytes - outstanding,
                std::span(pieces_).first(std::min(kMaxSubmit, free_slots_.size())));
            if (num_pieces_ == 0) {
                return has_moved;
            }
            if (memory_) {
                memory_->refresh();
            }
        }
        while (next_piece_ < num_pieces_) {
            if (!post_piece(pieces_[next_piece_])) {
                return has_moved;
            }
            ++next_piece_;
            has_moved = true;
        }
        if (has_moved) {
            return true;  // poll between two batches
        }
    }
}

bool SourcePath::post_probe() {
    is_probed_ =
        write(*free_slots_.back(), zeros_.data(), kScratchBytes,
              zeros_region_ ? zeros_region_->desc() : nullptr, sink_->scratch, 0, kProbeData) == 0;
    return is_probed_;
}

bool SourcePath::post_piece(const Piece& piece) {
    Slot& slot = *free_slots_.back();
    slot.id = piece.id;
    slot.nbytes = piece.nbytes;
    ssize_t result = 0;
    if (piece.nbytes == 0) {
        result = write(slot, zeros_.data(), kScratchBytes,
                       zeros_region_ ? zeros_region_->desc() : nullptr, sink_->scratch, 0,
                       encode_data(piece.immediate, 0, data_bytes_));
    } else {
        const Range* range = outbox_->ranges->find(piece.destination, piece.nbytes, hint_);
        const auto number = static_cast<std::size_t>(range - outbox_->ranges->ranges().data());
        std::uint64_t desc = 0;
        if (memory_ && !memory_->find(piece.source, piece.nbytes, desc)) {
            slot.id = 0;
            is_ours_ = true;
            fail_write("its source is not registered");
            return false;
        }
        result = write(slot, reinterpret_cast<const void*>(piece.source), piece.nbytes,
                       reinterpret_cast<void*>(desc), sink_->regions[number],
                       piece.destination - range->arena_offset,
                       encode_data(piece.immediate, piece.nbytes, data_bytes_));
        if (result == 0) {
            rail_->bytes_out.fetch_add(piece.nbytes, std::memory_order_relaxed);  // a statistic
        }
    }
    if (result != 0) {
        slot.id = 0;
    }
    return result == 0;
}

ssize_t SourcePath::write(Slot& slot, const void* source, std::uint64_t nbytes, void* desc,
                          const RegionFrame& region, std::uint64_t offset,
                          std::uint64_t data) noexcept {
    const iovec from{const_cast<void*>(source), nbytes};
    const abi::fi_rma_iov to{region.address + offset, nbytes, region.key};
    const abi::fi_msg_rma message{&from, &desc, 1, peer_, &to, 1, &slot.context, data};
    const ssize_t result =
        endpoint_.write(message, rail_->domain()->write_flags() | abi::FI_REMOTE_CQ_DATA);
    if (result == 0) {
        free_slots_.pop_back();
        is_blocked_ = false;
    } else if (result == -EAGAIN) {
        is_blocked_ = true;
    } else {
        fail_write(library().strerror(static_cast<int>(-result)));
    }
    return result;
}

Pollable::Rest SourcePath::rest() noexcept {
    Rest rest;
    const std::unique_lock lock(endpoint_.mutex(), std::try_to_lock);
    if (!lock || !endpoint_.is_open()) {
        rest.is_expecting = false;
        return rest;
    }
    const bool is_waiting =
        free_slots_.size() < slots_.size() || next_piece_ < num_pieces_ || !is_probed_;
    // What the provider did not take is tried again after a nap: no descriptor tells.
    rest.wait_fd = is_blocked_ ? -1 : endpoint_.wait_fd();
    rest.is_expecting = is_waiting || rest.wait_fd >= 0;
    rest.may_sleep = !outbox_->has_work[index_].load(std::memory_order_seq_cst) && !is_closing_ &&
                     (rest.wait_fd < 0 || endpoint_.may_sleep());
    return rest;
}

void SourcePath::close_locked() noexcept {
    if (!endpoint_.is_open()) {
        return;
    }
    zeros_region_.reset();
    endpoint_.close();
    for (const Slot& slot : slots_) {
        if (slot.id != 0) {
            rail_->bytes_done.fetch_add(slot.nbytes, std::memory_order_relaxed);
        }
    }
    outbox_->queue->leave(index_);
    is_closed_ = true;
}

void SourcePath::give_back_if_over() noexcept {
    if (is_closed_ && is_released_ && !has_given_back_.exchange(true)) {
        outbox_->queue->give_back(index_);
    }
}

void SourcePath::release() noexcept {
    is_released_ = true;
    give_back_if_over();
}

void SourcePath::retire() noexcept {
    is_closing_ = true;
    rail_->wake();
}

void SourcePath::condemn() noexcept {
    is_condemned_ = true;
    rail_->wake();
}

void SourcePath::drain() noexcept {
    // A provider that found our endpoint in its own process answers into it, whether or not it was
    // closed. So the sink, which lives as we do, gets to answer first.
    is_draining_ = true;
    const Deadline deadline = Deadline::after(kDrainS);
    while (!deadline.passed() && Endpoint::is_open_here(sink_->name)) {
        [[maybe_unused]] const bool has_moved = progress();
        {
            const std::unique_lock lock(endpoint_.mutex(), std::try_to_lock);
            if (lock && (!endpoint_.is_open() || free_slots_.size() == slots_.size())) {
                return;
            }
        }
        std::this_thread::sleep_for(100us);
    }
}

void SourcePath::close() noexcept {
    if (is_sink_here_) {
        drain();
    }
    is_closing_ = true;
    {
        const std::unique_lock lock = endpoint_.lock_within(kClosePatience);
        if (!lock) {
            return;
        }
        close_locked();
    }
    rail_->remove(*this);
    give_back_if_over();
}

}  // namespace weightsync::ofi
