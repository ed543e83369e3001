// Writes to several peers as one operation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <weightsync/engine.hpp>

namespace weightsync {

class ScatterOperation {
  public:
    struct Part {
        std::int64_t index = 0;          // in the caller's list of remotes
        std::shared_ptr<Remote> remote;  // outlives its operation
        std::shared_ptr<Operation> operation;
    };
    explicit ScatterOperation(std::vector<Part> parts) : parts_(std::move(parts)) {}

    // Done when all parts are, also after a failure of one: until then some memory is still read.
    [[nodiscard]] bool is_done() const noexcept;
    // Of all failed parts together once all are done; its scope, .peer and other facts are those of
    // the first, .remotes lists which failed.
    [[nodiscard]] std::optional<Error> error() const;
    // Throws error(), or kTimeout naming the peers that are not done.
    void wait(const Deadline& deadline) const;
    [[nodiscard]] std::uint64_t nbytes() const noexcept;
    [[nodiscard]] std::uint64_t num_writes() const noexcept;

  private:
    std::vector<Part> parts_;
};

}  // namespace weightsync
