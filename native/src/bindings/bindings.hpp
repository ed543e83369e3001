// Shared by the binding files: the only ones that know Python.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include <weightsync/error.hpp>

namespace weightsync {

// Classes of weightsync.errors for our exceptions, and Ctrl-C inside blocking calls.
void bind_errors(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_sim(pybind11::module_& m);
void bind_verbs(pybind11::module_& m);
void bind_kernels(pybind11::module_& m);

// The Python exception that an error stands for.
[[nodiscard]] pybind11::object to_exception(const Error& error);

// Keeps a Python object alive from C++; may be dropped on any thread.
[[nodiscard]] std::shared_ptr<void> keep_alive(pybind11::object object);

}  // namespace weightsync
