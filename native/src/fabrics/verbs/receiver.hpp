// The sink's end of one path: sets a bit per immediate and tells the source how many more fit.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <weightsync/board.hpp>

#include "rail.hpp"
#include "wire.hpp"

namespace weightsync::verbs {

// Everything but the constructor is for the rail's thread.
class Receiver final : public Link, Counted<Kind::kSession> {
  public:
    // `on_failure`: told on the rail's thread, once, when nothing can arrive any more.
    Receiver(Rail& rail, std::shared_ptr<Board> board, PathName name, std::string label,
             std::function<void()> on_failure);
    ~Receiver() override;

    [[nodiscard]] Rail& rail() const noexcept { return rail_; }
    // Makes the queue pair, connects it to the source's and posts all receives; `self` is this.
    [[nodiscard]] PathEnd open(const std::shared_ptr<Receiver>& self, const PathEnd& source);
    // The fence: after it returns nothing lands through this path. What had landed before has its
    // bit set, so that nothing the source was told to be there is lost.
    void close() noexcept;

    void on_completion(const ibv_wc& completion, std::uint32_t number) override;
    bool advance() override;
    void on_port(bool is_up) override {
        if (!is_up) {
            fail();
        }
    }

  private:
    static constexpr std::uint32_t kDepth = 512;  // receives; immediates on their way at most
    static constexpr std::uint32_t kBatch = kDepth / 4;  // posted, and announced, together
    // At most kDepth / kBatch announcements are on their way: the source spends what one grants
    // only after it has read it, and there is nothing to announce before it was spent.
    static constexpr std::uint32_t kSends = 8;
    static constexpr std::uint32_t kReceiveFlag = 1U << 31;

    void post_receives(std::uint32_t count);
    void announce();
    void fail();
    bool mark_all() noexcept;

    Rail& rail_;
    const std::shared_ptr<Board> board_;
    const PathName name_;
    const std::string label_;
    const std::function<void()> on_failure_;
    std::unique_ptr<QueuePair> queue_pair_;
    Tag tag_;
    bool is_broken_ = false;
    bool is_closing_ = false;
    std::uint32_t granted_ = 0;   // receives posted since the beginning, modulo 2^32
    std::uint32_t consumed_ = 0;  // since the last posting
    std::uint32_t num_announcing_ = 0;
    std::uint32_t depth_ = kDepth;

    std::vector<std::uint32_t> arrived_;  // immediates of this turn
    std::uint64_t arrived_bytes_ = 0;
    std::array<ibv_recv_wr, kDepth> receives_{};
};

}  // namespace weightsync::verbs
