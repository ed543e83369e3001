// Little-endian byte strings with bounds: descriptors travel between hosts and are never trusted.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <weightsync/error.hpp>

namespace weightsync {

static_assert(std::endian::native == std::endian::little, "tables are little-endian in memory too");

class ByteWriter {
  public:
    template <class Value>
    ByteWriter& put(const Value& value) {
        static_assert(std::is_trivially_copyable_v<Value>);
        return put_bytes(std::as_bytes(std::span(&value, 1)));
    }
    ByteWriter& put_text(std::string_view text) {
        put(static_cast<std::uint8_t>(text.size()));
        const auto* bytes = reinterpret_cast<const std::byte*>(text.data());
        bytes_.insert(bytes_.end(), bytes, bytes + text.size());
        return *this;
    }
    // Not inlined: gcc 12 sees bounds of vectors that it merged, and warns.
    [[gnu::noinline]] ByteWriter& put_bytes(std::span<const std::byte> bytes) {
        bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
        return *this;
    }
    [[nodiscard]] std::vector<std::byte> take() { return std::move(bytes_); }

  private:
    std::vector<std::byte> bytes_;
};

class ByteReader {
  public:
    explicit ByteReader(std::span<const std::byte> bytes) : rest_(bytes) {}

    template <class Value>
    [[nodiscard]] Value get() {
        static_assert(std::is_trivially_copyable_v<Value>);
        Value value;
        std::memcpy(&value, take(sizeof(Value)).data(), sizeof(Value));
        return value;
    }
    [[nodiscard]] std::string get_text() {
        const auto bytes = take(get<std::uint8_t>());
        return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    }
    [[nodiscard]] std::span<const std::byte> rest() const noexcept { return rest_; }
    void expect_end() const {
        if (!rest_.empty()) {
            throw Error(Scope::kConfig, "descriptor has " + std::to_string(rest_.size()) +
                                            " bytes too many; it is damaged");
        }
    }

  private:
    std::span<const std::byte> take(std::size_t count) {
        if (rest_.size() < count) {
            throw Error(Scope::kConfig, "descriptor is too short; it is damaged");
        }
        const auto head = rest_.first(count);
        rest_ = rest_.subspan(count);
        return head;
    }
    std::span<const std::byte> rest_;
};

inline constexpr std::uint32_t kDescriptorMagic = 0x44535357;  // "WSSD"
inline constexpr std::uint16_t kDescriptorVersion = 1;
inline constexpr std::size_t kMaxDescriptorBytes = std::size_t{1} << 20;

}  // namespace weightsync
