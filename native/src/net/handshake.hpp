// What the two ends of a new connection say to each other, little-endian, in four messages:
//   client -> Hello      what it wants, and a nonce
//   server -> Challenge  a nonce, and a proof that it knows the key of that target and generation
//   client -> Proof      that it knows the key too
//   server -> Verdict    one byte
// Both proofs cover everything that was said before, so nothing can be replayed or changed.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "hmac.hpp"

namespace weightsync::net {

inline constexpr std::uint32_t kHelloMagic = 0x314E5357;  // "WSN1"
inline constexpr std::uint16_t kHelloVersion = 1;

enum class LinkKind : std::uint8_t { kControl = 1, kData = 2 };

using Nonce = std::array<std::byte, 16>;

struct Hello {
    std::uint32_t magic = kHelloMagic;
    std::uint16_t version = kHelloVersion;
    LinkKind kind = LinkKind::kControl;
    std::uint8_t reserved = 0;
    std::uint64_t target_id = 0;
    std::uint64_t generation = 0;
    // Random, one per Remote: ties the connections of one source together.
    std::uint64_t session = 0;
    std::uint16_t path = 0;
    std::uint16_t stream = 0;
    // Counts how often the path was built: what a fence ends is every attempt up to its own.
    std::uint32_t attempt = 0;
    Nonce nonce{};
};
static_assert(sizeof(Hello) == 56 && std::is_trivially_copyable_v<Hello>);

enum class Verdict : std::uint8_t {
    kWelcome = 0,
    kGone = 1,  // no such target, or not of that generation
    kWrongKey = 2,
    kOtherVersion = 3,
};

struct Challenge {
    Verdict verdict = Verdict::kWelcome;  // anything else ends the connection
    std::array<std::uint8_t, 7> reserved{};
    Nonce nonce{};
    Mac proof{};
};
static_assert(sizeof(Challenge) == 56 && std::is_trivially_copyable_v<Challenge>);

template <class Message>
[[nodiscard]] std::span<const std::byte> bytes_of(const Message& message) noexcept {
    static_assert(std::is_trivially_copyable_v<Message>);
    return std::as_bytes(std::span(&message, 1));
}

// The proof of one side ("server" or "client").
[[nodiscard]] inline Mac prove(const Key& key, bool is_server, const Hello& hello,
                               const Nonce& server_nonce) {
    constexpr std::array<char, 6> kServer{'s', 'e', 'r', 'v', 'e', 'r'};
    constexpr std::array<char, 6> kClient{'c', 'l', 'i', 'e', 'n', 't'};
    return hmac_sha256(key, {std::as_bytes(std::span(is_server ? kServer : kClient)),
                             bytes_of(hello), std::span<const std::byte>(server_nonce)});
}

}  // namespace weightsync::net
