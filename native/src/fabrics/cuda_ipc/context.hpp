// A GPU's primary context, the one that torch uses too.
#pragma once

#include <memory>
#include <string>

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
    // Null where the driver refuses; `result` says why.
    [[nodiscard]] static std::shared_ptr<const Context> try_retain(const cuda::Driver& driver,
                                                                   int device, int& result) {
        void* handle = nullptr;
        result = driver.device_primary_ctx_retain(&handle, device);
        return result == 0 ? std::shared_ptr<const Context>(new Context(driver, device, handle))
                           : nullptr;
    }
    // Throws kMemory.
    [[nodiscard]] static std::shared_ptr<const Context> retain(const cuda::Driver& driver,
                                                               int device) {
        int result = 0;
        auto context = try_retain(driver, device, result);
        check(driver, result, "cuDevicePrimaryCtxRetain");
        return context;
    }
    ~Context() { driver_.device_primary_ctx_release(device_); }
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;

    [[nodiscard]] const cuda::Driver& driver() const noexcept { return driver_; }
    [[nodiscard]] void* handle() const noexcept { return handle_; }

  private:
    Context(const cuda::Driver& driver, int device, void* handle) noexcept
        : driver_(driver), device_(device), handle_(handle) {}

    const cuda::Driver& driver_;
    int device_;
    void* handle_;
};

// The context is this thread's for one scope, and what is called in it does not break a graph that
// another thread of the process captures.
class Current {
  public:
    explicit Current(const Context& context) noexcept
        : driver_(context.driver()), result_(driver_.ctx_push_current(context.handle())) {
        if (result_ == 0) {
            driver_.thread_exchange_stream_capture_mode(&capture_mode_);
        }
    }
    ~Current() {
        if (result_ == 0) {
            driver_.thread_exchange_stream_capture_mode(&capture_mode_);
            void* popped = nullptr;
            driver_.ctx_pop_current(&popped);
        }
    }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
    [[nodiscard]] int result() const noexcept { return result_; }

  private:
    const cuda::Driver& driver_;
    int capture_mode_ = cuda::kCaptureRelaxed;  // then the one before
    int result_;
};

// Where memory of a GPU was allocated.
struct Extent {
    std::uint64_t base = 0;
    std::uint64_t nbytes = 0;
    int device = 0;
};
// Throws kMemory, also for memory that is not of one allocation.
[[nodiscard]] inline Extent extent_of(const cuda::Driver& driver, std::uint64_t address,
                                      std::uint64_t size) {
    Extent extent;
    check(driver, driver.pointer_get_attribute(&extent.device, cuda::kPointerDevice, address),
          "cuPointerGetAttribute(DEVICE_ORDINAL)");
    const auto context = Context::retain(driver, extent.device);
    const Current current(*context);
    check(driver, current.result(), "cuCtxPushCurrent");
    std::size_t nbytes = 0;
    check(driver, driver.mem_get_address_range(&extent.base, &nbytes, address),
          "cuMemGetAddressRange");
    extent.nbytes = nbytes;
    const std::uint64_t offset = address - extent.base;
    if (offset > nbytes || size > nbytes - offset) {
        throw Error(Scope::kMemory,
                    std::to_string(size) + " bytes of GPU " + std::to_string(extent.device) +
                        " at address " + std::to_string(address) +
                        " are not of one allocation: lease each by itself; of torch's expandable "
                        "segments none can be used: set "
                        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False");
    }
    return extent;
}

}  // namespace weightsync::cuda_ipc
