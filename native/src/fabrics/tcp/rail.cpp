#include "rail.hpp"

#include "../../net/numa.hpp"

namespace weightsync::tcp {

Rail::Rail(std::size_t number, net::Address own_address, bool is_bound)
    : name("tcp" + std::to_string(number)),
      address(own_address),
      local(is_bound ? std::optional(own_address) : std::nullopt),
      reactor("ws-" + name, [own_address] { net::pin_near(own_address); }) {}

}  // namespace weightsync::tcp
