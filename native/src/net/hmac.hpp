// HMAC-SHA256 of the system's libcrypto, which is loaded at run time and never linked.
#pragma once

#include <array>
#include <cstddef>
#include <initializer_list>
#include <span>

namespace weightsync::net {

using Key = std::array<std::byte, 32>;
using Mac = std::array<std::byte, 32>;

// Of the parts one after the other. Throws kConfig when there is no libcrypto.
[[nodiscard]] Mac hmac_sha256(const Key& key,
                              std::initializer_list<std::span<const std::byte>> parts);

// Takes the same time wherever the first difference is.
[[nodiscard]] bool is_same(const Mac& a, const Mac& b) noexcept;

// Null when libcrypto can be used, else why not.
[[nodiscard]] const char* libcrypto_problem();

[[nodiscard]] Key make_key();

}  // namespace weightsync::net
