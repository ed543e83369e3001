// The work of one Remote, shared by its paths. Paths pull: whoever has room takes the next pieces,
// so a slow rail gets less without anybody choosing, and nothing is bound to a rail before it goes.
// A path leaves their share to those that were woken with it and have not come yet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include <weightsync/operation.hpp>

namespace weightsync {

// A row, or a part of a long one.
struct Piece {
    std::uint64_t source = 0;
    std::uint64_t destination = 0;
    std::uint64_t nbytes = 0;
    std::int64_t immediate = kNoImmediate;
    std::uint64_t id = 0;  // for complete(); never 0
};

// One row is one arrival, whatever the rails: of a row that is cut, only the last piece carries the
// immediate, and it is given out when the others are complete.
//
// Thread-safe. Every call is O(1) per piece; a piece costs no allocation once the tables have grown
// to the number of pieces in flight. Operations finish outside of locks, each exactly once, when no
// path holds a piece of them any more.
class SendQueue {
  public:
    // Called on any thread, without locks, to make a path call take() soon. It may be called for a
    // path that then finds nothing.
    using Wake = std::function<void(std::size_t path)>;

    // `max_piece_bytes`: the most that every path can send at once, >= 1.
    SendQueue(std::size_t num_paths, std::uint64_t max_piece_bytes, Wake wake);
    // Only after fail() and give_back() of all paths.
    ~SendQueue() = default;
    SendQueue(const SendQueue&) = delete;
    SendQueue& operator=(const SendQueue&) = delete;

    // O(1) in the number of rows: they are cut when they are taken. After fail() the operation
    // fails at once.
    void push(std::shared_ptr<Operation> operation);

    // Gives out up to pieces.size() pieces of together `max_bytes` at most; the first one may be
    // longer than that, so that there is always progress. 0 when there is nothing to do: the path
    // is woken when there is.
    [[nodiscard]] std::size_t take(std::size_t path, std::uint64_t max_bytes,
                                   std::span<Piece> pieces);
    // These bytes are at the sink and the source is not read any more. Ids that `path` does not
    // hold (late completions of what was given back) are ignored.
    void complete(std::size_t path, std::span<const std::uint64_t> ids);

    // The path takes nothing until it calls take() again; what it holds it keeps. When a path
    // fails: at once, so that nobody counts on it.
    void leave(std::size_t path);
    // The path is dead and nothing of it can land any more: its pieces go to the other paths.
    void give_back(std::size_t path);
    // No path is left. Operations without a piece on any path fail now, the others with their last
    // complete() or give_back(). Later calls change nothing.
    void fail(const Error& error);

    // Bytes that a path holds.
    [[nodiscard]] std::uint64_t outstanding_bytes(std::size_t path) const;
    // Bytes that no path holds yet.
    [[nodiscard]] std::uint64_t pending_bytes() const;
    [[nodiscard]] bool is_failed() const;

  private:
    static constexpr std::uint32_t kNone = ~std::uint32_t{0};

    struct Entry {
        std::shared_ptr<Operation> operation;
        std::size_t next_row = 0;
        std::uint64_t next_offset = 0;  // in that row
        std::uint32_t split = kNone;    // of that row while it is cut
        std::size_t rows_left = 0;      // not yet complete
        std::size_t num_held = 0;       // pieces on paths
    };
    using Entries = std::list<Entry>;

    // A row that was cut.
    struct Split {
        std::uint64_t pieces_left = 0;  // without the last, when that is held back
        Piece last;
        bool has_last = false;
    };
    struct Slot {
        Piece piece;
        Entries::iterator entry;
        std::uint32_t split = kNone;  // counts down when this is complete
        bool is_row = false;          // completes its row
        std::uint32_t path = kNone;   // kNone: in ready_
        std::uint32_t tag = 0;        // high half of the id: tells uses of a slot apart
        std::uint32_t previous = kNone;
        std::uint32_t next = kNone;  // on its path
    };
    struct Path {
        std::uint64_t outstanding = 0;
        std::uint32_t first = kNone;
        bool is_woken = false;  // and has not called take() since
        bool is_idle = false;
    };
    struct Finished {
        std::shared_ptr<Operation> operation;
        std::optional<Error> error;
    };
    struct Effects;  // what is left to do after unlocking

    [[nodiscard]] std::uint32_t new_slot();
    void free_slot(std::uint32_t index);
    [[nodiscard]] std::uint64_t share_of_pending() const;
    [[nodiscard]] std::uint32_t cut();
    void link(std::uint32_t index, std::size_t path);
    void unlink(std::uint32_t index);
    void complete_slot(std::uint32_t index, Effects& effects);
    void settle(Entries::iterator entry, Effects& effects);
    void drop_ready();
    void choose_wakes(Effects& effects);
    void apply(Effects& effects);

    const std::uint64_t max_piece_bytes_;
    const Wake wake_;
    mutable std::mutex mutex_;
    std::vector<Path> paths_;
    std::size_t next_wake_;  // where the search for an idle path begins
    Entries entries_;
    Entries::iterator cursor_;  // the first with rows that nobody took
    std::vector<Slot> slots_;
    std::vector<std::uint32_t> free_slots_;
    std::vector<Split> splits_;
    std::vector<std::uint32_t> free_splits_;
    std::deque<std::uint32_t> ready_;  // pieces that come before those at the cursor
    std::uint64_t pending_bytes_ = 0;
    std::optional<Error> error_;
};

}  // namespace weightsync
