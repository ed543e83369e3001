// One local address: its thread, and what went over it.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>

#include "../../net/address.hpp"
#include "../../net/reactor.hpp"

namespace weightsync::tcp {

struct Rail {
    Rail(std::size_t number, net::Address own_address, bool is_bound);

    const std::string name;  // "tcp0"
    const net::Address address;
    // Where connections of this rail start: unset when the system may choose.
    const std::optional<net::Address> local;
    net::Reactor reactor;
    // relaxed: statistics
    std::atomic<std::uint64_t> bytes_out{0};
    std::atomic<std::uint64_t> bytes_in{0};
};

}  // namespace weightsync::tcp
