#include <weightsync/error.hpp>

#include <atomic>
#include <cstdio>
#include <cstring>

namespace weightsync {

std::string Error::where() const {
    const char* file = std::strrchr(where_.file_name(), '/');
    return std::string(file == nullptr ? where_.file_name() : file + 1) + ":" +
           std::to_string(where_.line());
}

std::string errno_text(int error) {
    const char* name = ::strerrorname_np(error);
    const char* text = ::strerrordesc_np(error);
    if (name == nullptr || text == nullptr) {
        return "errno " + std::to_string(error);
    }
    return std::string(name) + " (" + text + ")";
}

Error os_error(Scope scope, std::string_view call, int error, std::string_view advice,
               std::source_location where) {
    std::string detail = std::string(call) + " failed: " + errno_text(error);
    if (!advice.empty()) {
        detail += "; ";
        detail += advice;
    }
    return Error(scope, std::move(detail),
                 {{"call", std::string(call)}, {"errno", std::int64_t{error}}}, where);
}

namespace {

void report_to_stderr(const char* message) noexcept {
    std::fprintf(stderr, "weightsync: %s\n", message);
}

std::atomic<Reporter> current_reporter{&report_to_stderr};

}  // namespace

void set_reporter(Reporter reporter) noexcept {
    current_reporter.store(reporter == nullptr ? &report_to_stderr : reporter);
}

void report(const std::string& message) noexcept {
    current_reporter.load()(message.c_str());
}

}  // namespace weightsync
