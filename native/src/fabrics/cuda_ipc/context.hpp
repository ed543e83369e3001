// A GPU's primary context, the one that torch uses too.
#pragma once

#include <weightsync/error.hpp>

#include "../../cuda/driver.hpp"

namespace weightsync::cuda_ipc {

// Throws unless `result` is 0.
inline void check(const cuda::Driver& driver, int result, const char* call) {
    if (result != 0) {
        throw Error(Scope::kMemory,
                    std::string(call) + " failed: " + cuda::result_text(driver, result));
    }
}

class Context {
  public:
    Context(const cuda::Driver& driver, int device) : driver_(driver), device_(device) {
        check(driver, driver.device_primary_ctx_retain(&handle_, device),
              "cuDevicePrimaryCtxRetain");
    }
    ~Context() { driver_.device_primary_ctx_release(device_); }
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;

    [[nodiscard]] const cuda::Driver& driver() const noexcept { return driver_; }
    [[nodiscard]] void* handle() const noexcept { return handle_; }

  private:
    const cuda::Driver& driver_;
    int device_;
    void* handle_ = nullptr;
};

// The context is this thread's for one scope.
class Current {
  public:
    explicit Current(const Context& context) noexcept
        : driver_(context.driver()), result_(driver_.ctx_push_current(context.handle())) {}
    ~Current() {
        if (result_ == 0) {
            void* popped = nullptr;
            driver_.ctx_pop_current(&popped);
        }
    }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
    [[nodiscard]] int result() const noexcept { return result_; }

  private:
    const cuda::Driver& driver_;
    int result_;
};

// Where an address of a GPU was allocated.
struct Extent {
    std::uint64_t base = 0;
    std::uint64_t nbytes = 0;
    int device = 0;
};
// Throws kMemory.
[[nodiscard]] inline Extent extent_of(const cuda::Driver& driver, std::uint64_t address) {
    Extent extent;
    check(driver, driver.pointer_get_attribute(&extent.device, cuda::kPointerDevice, address),
          "cuPointerGetAttribute(DEVICE_ORDINAL)");
    const Context context(driver, extent.device);
    const Current current(context);
    check(driver, current.result(), "cuCtxPushCurrent");
    std::size_t nbytes = 0;
    check(driver, driver.mem_get_address_range(&extent.base, &nbytes, address),
          "cuMemGetAddressRange");
    extent.nbytes = nbytes;
    return extent;
}

}  // namespace weightsync::cuda_ipc
