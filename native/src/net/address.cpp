#include "address.hpp"

#include <arpa/inet.h>
#include <netdb.h>

#include <array>
#include <cerrno>
#include <cstring>

#include <weightsync/error.hpp>

namespace weightsync::net {

namespace {

const sockaddr_in& v4(const sockaddr_storage& storage) {
    return reinterpret_cast<const sockaddr_in&>(storage);
}
const sockaddr_in6& v6(const sockaddr_storage& storage) {
    return reinterpret_cast<const sockaddr_in6&>(storage);
}

}  // namespace

Address Address::parse(const std::string& host, std::uint16_t port) {
    Address address;
    // Not getaddrinfo() for these: it takes "10.1" for 10.0.0.1.
    auto& plain = reinterpret_cast<sockaddr_in&>(address.storage);
    // A NUL inside would hide the rest of what a damaged descriptor says.
    const bool is_text = host.find('\0') == std::string::npos;
    if (is_text && ::inet_pton(AF_INET, host.c_str(), &plain.sin_addr) == 1) {
        plain.sin_family = AF_INET;
        plain.sin_port = htons(port);
        address.length = sizeof(sockaddr_in);
        return address;
    }
    addrinfo hints{};
    hints.ai_family = AF_INET6;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
    addrinfo* found = nullptr;
    const std::string service = std::to_string(port);
    if (!is_text || ::getaddrinfo(host.c_str(), service.c_str(), &hints, &found) != 0) {
        throw Error(Scope::kConfig,
                    "'" + host + "' is not a numeric IPv4 or IPv6 address such as 10.0.0.5");
    }
    std::memcpy(&address.storage, found->ai_addr, found->ai_addrlen);
    address.length = found->ai_addrlen;
    ::freeaddrinfo(found);
    return address;
}

Address Address::of_socket(int socket) {
    Address address;
    address.length = sizeof(address.storage);
    if (::getsockname(socket, reinterpret_cast<sockaddr*>(&address.storage), &address.length) !=
        0) {
        throw os_error(Scope::kTransfer, "getsockname", errno, "");
    }
    return address;
}

std::uint16_t Address::port() const noexcept {
    return ntohs(family() == AF_INET6 ? v6(storage).sin6_port : v4(storage).sin_port);
}

bool Address::is_loopback() const noexcept {
    if (family() == AF_INET6) {
        return IN6_IS_ADDR_LOOPBACK(&v6(storage).sin6_addr) != 0;
    }
    constexpr std::uint32_t kLoopbackNet = 127;
    return ntohl(v4(storage).sin_addr.s_addr) >> 24U == kLoopbackNet;
}

bool Address::is_any() const noexcept {
    if (family() == AF_INET6) {
        return IN6_IS_ADDR_UNSPECIFIED(&v6(storage).sin6_addr) != 0;
    }
    return v4(storage).sin_addr.s_addr == htonl(INADDR_ANY);
}

std::string Address::host() const {
    std::array<char, NI_MAXHOST> text{};
    if (::getnameinfo(get(), length, text.data(), static_cast<socklen_t>(text.size()), nullptr, 0,
                      NI_NUMERICHOST) != 0) {
        return "?";
    }
    return text.data();
}

std::string Address::text() const {
    const std::string port_text = ":" + std::to_string(port());
    return family() == AF_INET6 ? "[" + host() + "]" + port_text : host() + port_text;
}

}  // namespace weightsync::net
