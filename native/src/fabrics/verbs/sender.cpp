#include "sender.hpp"

#include <arpa/inet.h>

#include <algorithm>
#include <cerrno>

namespace weightsync::verbs {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint32_t kNumberMask = (1U << 31) - 1;
// A device that takes no requests although its queue has room is short of something for a moment.
constexpr std::chrono::milliseconds kPostRetry{1};
constexpr std::chrono::seconds kPostPatience{2};
// A reliable connection completes or fails in half a second with the default timeout; software
// devices have been seen to do neither when a route is gone.
constexpr std::chrono::seconds kLeastStall{5};

Clock::duration stall_time(const PathOptions& options) {
    const auto attempt = std::chrono::nanoseconds(std::int64_t{4096} << options.timeout);
    return std::max<Clock::duration>(kLeastStall, attempt * 4 * (options.retry_count + 1));
}

}  // namespace

Sender::Sender(Rail& rail, std::size_t rail_index, std::shared_ptr<Outbox> outbox, PathName name,
               std::string label, OnFailure on_failure, OnSuccess on_success)
    : rail_(rail),
      outbox_(std::move(outbox)),
      name_(name),
      label_(std::move(label)),
      on_failure_(std::move(on_failure)),
      on_success_(std::move(on_success)),
      memory_(outbox_->memory, rail_index) {
    completed_.reserve(kDepth);
    stash_.reserve(kChain);
    prepare_templates();
}

Sender::~Sender() {
    if (queue_pair_) {
        report("verbs fabric: the sender " + label_ + " was dropped while it was open");
    }
}

void Sender::prepare_templates() {
    for (std::uint32_t i = 0; i < kChain; ++i) {
        requests_[i].next = i + 1 < kChain ? &requests_[i + 1] : nullptr;
        requests_[i].sg_list = &parts_[i];
    }
}

PathEnd Sender::open(const std::shared_ptr<Sender>& self) {
    queue_pair_ = rail_.make_queue_pair({kDepth, kCreditReceives});
    depth_ =
        std::min(kDepth, static_cast<std::uint32_t>(std::max(rail_.port().device.max_qp_wr, 1)));
    tag_ = rail_.attach(self);
    PathEnd end;
    end.name = name_;
    end.endpoint = queue_pair_->local();
    try {
        post_receives(kCreditReceives);
    } catch (...) {
        close();
        throw;
    }
    return end;
}

void Sender::start(const PathEnd& sink, bool is_probe) {
    queue_pair_->connect(rail_.port(), sink.endpoint);
    granted_ = sink.num_receives;
    is_probing_ = is_probe;
    is_started_ = true;
    outbox_->has_work[name_.path].store(true);
}

void Sender::close() noexcept {
    if (!queue_pair_) {
        return;
    }
    is_started_ = false;
    try {
        // What was acknowledged until now counts; after RESET nothing reads our memory.
        queue_pair_->stop();
        rail_.poll();
        queue_pair_->reset();
        rail_.poll();
        settle();
    } catch (const std::exception& error) {
        report("verbs fabric: " + label_ + ": " + error.what());
    }
    rail_.detach(tag_);
    queue_pair_.reset();
    rail_.counts().outstanding.fetch_sub(outstanding_bytes_, std::memory_order_relaxed);
    outstanding_bytes_ = 0;
    stash_.clear();
}

void Sender::post_receives(std::uint32_t count) {
    for (std::uint32_t i = 0; i < count; ++i) {
        receives_[i].wr_id = tag_.of(kReceiveFlag);
        receives_[i].next = i + 1 < count ? &receives_[i + 1] : nullptr;
    }
    ibv_recv_wr* failed = nullptr;
    if (const int error = queue_pair_->post_receive(receives_.data(), &failed); error != 0) {
        throw os_error(Scope::kQueuePair, label_ + ": ibv_post_recv", std::abs(error), "",
                       std::source_location::current());
    }
}

Error Sender::completion_error(const ibv_wc& completion) const {
    std::string advice;
    switch (completion.status) {
        case IBV_WC_RETRY_EXC_ERR:
        case IBV_WC_RESP_TIMEOUT_ERR:
            advice =
                "the peer does not answer: it is gone, a link is down, or lossless Ethernet "
                "(PFC/ECN) is not set up";
            break;
        case IBV_WC_REM_ACCESS_ERR:
        case IBV_WC_REM_INV_REQ_ERR:
            advice = "the peer took its memory back";
            break;
        case IBV_WC_LOC_PROT_ERR:
        case IBV_WC_LOC_ACCESS_ERR:
            advice = "source memory was unmapped while it was leased";
            break;
        default:
            advice = "see the kernel log and the port's error counters";
            break;
    }
    return Error(
        Scope::kQueuePair,
        label_ + ": a write failed: " + rail_.table().wc_status_str(completion.status) +
            " (vendor error " + std::to_string(completion.vendor_err) + "); " + advice,
        {{"rail", rail_.name()}, {"status", static_cast<std::int64_t>(completion.status)}});
}

void Sender::break_with(Error error) {
    if (!error_) {
        error_ = std::move(error);
    }
}

void Sender::on_port(bool is_up) {
    if (!is_up) {
        break_with(Error(Scope::kRail, label_ + ": the port went down", {{"rail", rail_.name()}}));
    }
}

void Sender::on_completion(const ibv_wc& completion, std::uint32_t number) {
    if (completion.status != IBV_WC_SUCCESS) {
        // What it flushes after the first error is no news. Requests before a failed one that did
        // not ask for a completion are left as they are: sending them again does no harm.
        if (completion.status != IBV_WC_WR_FLUSH_ERR || is_started_) {
            break_with(completion_error(completion));
        }
        return;
    }
    if ((number & kReceiveFlag) != 0) {
        ++receives_free_;
        granted_ = ntohl(completion.imm_data);
        return;
    }
    // Of the last request of a chain: those before it are done too, as they complete in order.
    const std::uint32_t count = ((number - done_) & kNumberMask) + 1;
    if (count > outstanding()) {
        break_with(Error(Scope::kInternal, label_ + ": completion of a request never posted"));
        return;
    }
    for (std::uint32_t i = 0; i < count; ++i) {
        const Sent& sent = sent_[(done_ + i) % kDepth];
        completed_.push_back(sent.id);
        outstanding_bytes_ -= sent.nbytes;
        rail_.counts().outstanding.fetch_sub(sent.nbytes, std::memory_order_relaxed);
        rail_.counts().bytes_out.fetch_add(sent.nbytes, std::memory_order_relaxed);
    }
    done_ += count;
    moved_at_ = Clock::now();
}

// Tells the queue what came through.
bool Sender::settle() {
    if (completed_.empty()) {
        return false;
    }
    outbox_->queue->complete(name_.path, completed_);
    completed_.clear();
    if (is_probing_) {
        is_probing_ = false;
        on_success_();
    }
    return true;
}

// Requests that may be posted now. Any of them may carry an immediate, so credits bound them all.
std::uint32_t Sender::room() const noexcept {
    if (is_probing_) {
        return outstanding() == 0 && granted_ != spent_ ? 1 : 0;
    }
    return std::min({kChain, depth_ - outstanding(), granted_ - spent_});
}

bool Sender::fill(std::uint32_t i, const Piece& piece) {
    ibv_send_wr& request = requests_[i];
    const Range* range = outbox_->ranges.find(piece.destination, piece.nbytes, range_hint_);
    if (range == nullptr) {
        return false;  // checked by the core before it came here
    }
    request.wr_id = tag_.of((posted_ + i) & kNumberMask);
    request.send_flags = 0;
    if (piece.immediate >= 0) {
        request.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
        request.imm_data = htonl(static_cast<std::uint32_t>(piece.immediate));
    } else {
        request.opcode = IBV_WR_RDMA_WRITE;
    }
    const auto number = static_cast<std::size_t>(range - outbox_->ranges.ranges().data());
    request.rdma.remote_addr = range->base + (piece.destination - range->arena_offset);
    request.rdma.rkey = outbox_->rkeys[number * outbox_->num_sink_rails + name_.sink_rail];
    request.num_sge = piece.nbytes == 0 ? 0 : 1;
    parts_[i].addr = piece.source;
    parts_[i].length = static_cast<std::uint32_t>(piece.nbytes);
    std::uint64_t lkey = 0;
    if (piece.nbytes != 0 && !memory_.find(piece.source, piece.nbytes, lkey)) {
        return false;
    }
    parts_[i].lkey = static_cast<std::uint32_t>(lkey);
    return true;
}

// Posts the first `count` of pieces_; returns how many of them the device took.
std::uint32_t Sender::post_chain(std::uint32_t count) {
    memory_.refresh();
    for (std::uint32_t i = 0; i < count; ++i) {
        if (!fill(i, pieces_[i])) {
            break_with(Error(Scope::kInternal,
                             label_ + ": a piece reads or writes memory that is not registered"));
            return 0;
        }
    }
    // One completion for all: it says that those before are done too.
    ibv_send_wr& last = requests_[count - 1];
    ibv_send_wr* const next = last.next;
    last.next = nullptr;
    last.send_flags = IBV_SEND_SIGNALED;
    ibv_send_wr* failed = nullptr;
    const int error = std::abs(queue_pair_->post_send(requests_.data(), &failed));
    last.next = next;
    std::uint32_t taken = count;
    if (error != 0) {
        const auto before = failed == nullptr ? 0 : failed - requests_.data();
        taken = static_cast<std::uint32_t>(std::clamp<std::ptrdiff_t>(before, 0, count));
    }
    if (outstanding() == 0) {
        moved_at_ = Clock::now();
    }
    for (std::uint32_t i = 0; i < taken; ++i) {
        const Piece& piece = pieces_[i];
        sent_[(posted_ + i) % kDepth] = {piece.id, piece.nbytes};
        outstanding_bytes_ += piece.nbytes;
        rail_.counts().outstanding.fetch_add(piece.nbytes, std::memory_order_relaxed);
        spent_ += piece.immediate >= 0 ? 1 : 0;
    }
    posted_ += taken;
    note_refusal(error, taken != 0);
    return taken;
}

void Sender::note_refusal(int error, bool has_progress) {
    if (error == 0) {
        refused_since_.reset();
        return;
    }
    const auto now = Clock::now();
    if (has_progress || !refused_since_) {
        refused_since_ = now;
    }
    if (error != ENOMEM || now - *refused_since_ > kPostPatience) {
        break_with(os_error(Scope::kQueuePair, label_ + ": ibv_post_send", error,
                            "the device takes no requests"));
    }
}

// Posts again what the device did not take; true when nothing is left of it.
bool Sender::retry_stash(std::uint32_t free) {
    const auto now = Clock::now();
    if (now < retry_at_) {
        rail_.wake_by(retry_at_);
        return false;
    }
    const auto count = std::min<std::size_t>(stash_.size(), free);
    std::copy_n(stash_.begin(), count, pieces_.begin());
    const std::uint32_t taken = post_chain(static_cast<std::uint32_t>(count));
    stash_.erase(stash_.begin(), stash_.begin() + taken);
    retry_at_ = now + kPostRetry;
    if (!stash_.empty()) {
        rail_.wake_by(retry_at_);
    }
    return stash_.empty();
}

bool Sender::send_more() {
    bool is_busy = false;
    while (!error_) {
        const std::uint32_t free = room();
        if (free == 0 || outstanding_bytes_ >= kWindowBytes) {
            break;
        }
        if (!stash_.empty()) {
            if (!retry_stash(free)) {
                break;
            }
            continue;
        }
        std::atomic<bool>& has_work = outbox_->has_work[name_.path];
        if (!has_work.exchange(false)) {
            break;
        }
        const std::size_t count = outbox_->queue->take(
            name_.path, kWindowBytes - outstanding_bytes_, std::span(pieces_).first(free));
        if (count == 0) {
            break;  // woken when there is more
        }
        has_work.store(true);
        is_busy = true;
        const std::uint32_t taken = post_chain(static_cast<std::uint32_t>(count));
        stash_.assign(pieces_.begin() + taken,
                      pieces_.begin() + static_cast<std::ptrdiff_t>(count));
    }
    return is_busy;
}

void Sender::watch_for_stall() {
    if (outstanding() == 0) {
        return;
    }
    const auto end = moved_at_ + stall_time(rail_.port().options);
    if (Clock::now() < end) {
        rail_.wake_by(end);
        return;
    }
    break_with(Error(Scope::kRail, label_ + ": nothing was acknowledged for too long",
                     {{"rail", rail_.name()}}));
}

bool Sender::advance() {
    if (!queue_pair_) {
        return false;
    }
    bool is_busy = settle();
    if (!error_ && receives_free_ != 0) {
        try {
            post_receives(receives_free_);
            receives_free_ = 0;
        } catch (const Error& error) {
            break_with(error);
        }
    }
    if (!error_ && is_started_) {
        is_busy = send_more() || is_busy;
        watch_for_stall();
    }
    if (error_) {
        const Error error = *error_;
        close();
        outbox_->queue->leave(name_.path);
        on_failure_(error);
        return true;
    }
    return is_busy;
}

}  // namespace weightsync::verbs
