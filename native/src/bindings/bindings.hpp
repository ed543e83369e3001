// Shared by the binding files: the only ones that know Python.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <weightsync/engine.hpp>

namespace weightsync {

// Classes of weightsync.errors for our exceptions, and Ctrl-C inside blocking calls.
void bind_errors(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_groups(pybind11::module_& m);
void bind_sim(pybind11::module_& m);
void bind_verbs(pybind11::module_& m);
void bind_kernels(pybind11::module_& m);

// The Python exception that an error stands for.
[[nodiscard]] pybind11::object to_exception(const Error& error);

// Timeout arguments: None waits for ever.
[[nodiscard]] Deadline to_deadline(std::optional<double> timeout_s);
// Arguments that cannot be negative.
[[nodiscard]] std::uint64_t to_size(std::int64_t value, const char* name);
// Whole numbers of any integer array or sequence; the first checked to fit 32 bits.
[[nodiscard]] std::vector<std::int32_t> to_int32(const pybind11::object& values, const char* name);
[[nodiscard]] std::vector<std::int64_t> to_int64(const pybind11::object& values, const char* name);
// A table of writes; borrowed from the array.
[[nodiscard]] std::span<const Write> to_rows(const pybind11::array& writes);

// Keeps a Python object alive from C++; may be dropped on any thread.
[[nodiscard]] std::shared_ptr<void> keep_alive(pybind11::object object);

}  // namespace weightsync
