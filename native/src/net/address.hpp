// Numeric IP addresses and ports.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <string_view>

namespace weightsync::net {

struct Address {
    sockaddr_storage storage{};
    socklen_t length = 0;

    // "10.0.0.5", "fd00::5", "fe80::1%eth0": names are not looked up. Throws kConfig.
    [[nodiscard]] static Address parse(const std::string& host, std::uint16_t port);
    [[nodiscard]] static Address of_socket(int socket);
    [[nodiscard]] const sockaddr* get() const noexcept {
        return reinterpret_cast<const sockaddr*>(&storage);
    }
    [[nodiscard]] int family() const noexcept { return storage.ss_family; }
    [[nodiscard]] std::uint16_t port() const noexcept;
    [[nodiscard]] bool is_loopback() const noexcept;
    // 0.0.0.0 or ::, which nobody can connect to.
    [[nodiscard]] bool is_any() const noexcept;
    // "10.0.0.5:4711", "[fd00::5]:4711"
    [[nodiscard]] std::string text() const;
    // Without the port.
    [[nodiscard]] std::string host() const;
};

}  // namespace weightsync::net
