#include "receiver.hpp"

#include <arpa/inet.h>

#include <algorithm>

namespace weightsync::verbs {

Receiver::Receiver(Rail& rail, std::shared_ptr<Board> board, PathName name, std::string label,
                   std::function<void()> on_failure)
    : rail_(rail),
      board_(std::move(board)),
      name_(name),
      label_(std::move(label)),
      on_failure_(std::move(on_failure)) {
    arrived_.reserve(kDepth);
}

Receiver::~Receiver() {
    if (queue_pair_) {
        report("verbs fabric: the receiver " + label_ + " was dropped while it was open");
    }
}

PathEnd Receiver::open(const std::shared_ptr<Receiver>& self, const PathEnd& source) {
    depth_ =
        std::min(kDepth, static_cast<std::uint32_t>(std::max(rail_.port().device.max_qp_wr, 1)));
    queue_pair_ = rail_.make_queue_pair({kSends, depth_});
    tag_ = rail_.attach(self);
    try {
        post_receives(depth_);
        queue_pair_->connect(rail_.port(), source.endpoint);
    } catch (...) {
        close();
        throw;
    }
    PathEnd end;
    end.name = name_;
    end.num_receives = granted_;
    end.endpoint = queue_pair_->local();
    return end;
}

void Receiver::close() noexcept {
    if (!queue_pair_) {
        return;
    }
    is_closing_ = true;
    try {
        // ERR stops whatever comes next; the completions of what had come are read, which RESET
        // might drop. A device that was in the middle of a message ends with RESET at the latest.
        queue_pair_->stop();
        rail_.poll();
        queue_pair_->reset();
        rail_.poll();
    } catch (const std::exception& error) {
        report("verbs fabric: " + label_ + ": " + error.what());
    }
    mark_all();
    rail_.detach(tag_);
    queue_pair_.reset();
}

void Receiver::post_receives(std::uint32_t count) {
    for (std::uint32_t i = 0; i < count; ++i) {
        receives_[i].wr_id = tag_.of(kReceiveFlag);
        receives_[i].next = i + 1 < count ? &receives_[i + 1] : nullptr;
    }
    ibv_recv_wr* failed = nullptr;
    if (const int error = queue_pair_->post_receive(receives_.data(), &failed); error != 0) {
        throw os_error(Scope::kQueuePair, label_ + ": ibv_post_recv", std::abs(error), "");
    }
    granted_ += count;
}

void Receiver::on_completion(const ibv_wc& completion, std::uint32_t number) {
    if (completion.status != IBV_WC_SUCCESS) {
        fail();
        return;
    }
    if ((number & kReceiveFlag) == 0) {
        --num_announcing_;
        return;
    }
    ++consumed_;
    if (completion.opcode != IBV_WC_RECV_RDMA_WITH_IMM) {
        return;  // nobody sends us messages; harmless
    }
    arrived_.push_back(ntohl(completion.imm_data));
    arrived_bytes_ += completion.byte_len;
}

// Sets the bits of this turn's arrivals.
bool Receiver::mark_all() noexcept {
    if (arrived_.empty()) {
        return false;
    }
    // Counted before they are marked, so that whoever sees the last bit of a slot finds them
    // counted; what turns out to be no new arrival is taken off again.
    Tally tally;
    tally.arrivals = arrived_.size();
    tally.bytes = arrived_bytes_;
    board_->account(tally);
    Tally found;
    for (const std::uint32_t immediate : arrived_) {
        found.add(board_->mark(immediate));
    }
    if (found.arrivals != tally.arrivals) {
        board_->correct(tally.arrivals - found.arrivals, found);
    }
    rail_.counts().bytes_in.fetch_add(arrived_bytes_, std::memory_order_relaxed);
    arrived_.clear();
    arrived_bytes_ = 0;
    return true;
}

// A source that has run out of credits posts nothing, so it would never see an error of its own.
void Receiver::fail() {
    if (!is_broken_ && !is_closing_) {
        on_failure_();
    }
    is_broken_ = true;
}

void Receiver::announce() {
    ibv_send_wr request{};
    request.wr_id = tag_.of(0);
    request.opcode = IBV_WR_SEND_WITH_IMM;
    request.send_flags = IBV_SEND_SIGNALED;
    request.imm_data = htonl(granted_);
    ibv_send_wr* failed = nullptr;
    if (const int error = queue_pair_->post_send(&request, &failed); error != 0) {
        throw os_error(Scope::kQueuePair, label_ + ": ibv_post_send", std::abs(error), "");
    }
    ++num_announcing_;
}

bool Receiver::advance() {
    bool is_busy = mark_all();
    const std::uint32_t batch = std::max(depth_ / (kDepth / kBatch), 1U);
    if (!queue_pair_ || is_broken_ || is_closing_ || consumed_ < batch ||
        num_announcing_ == kSends) {
        return is_busy;
    }
    try {
        post_receives(consumed_);
        consumed_ = 0;
        announce();
    } catch (const std::exception& error) {
        report("verbs fabric: " + label_ + ": " + error.what());
        fail();
    }
    return true;
}

}  // namespace weightsync::verbs
