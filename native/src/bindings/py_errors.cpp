#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <utility>

#include <weightsync/os.hpp>

#include "bindings.hpp"

namespace py = pybind11;

namespace weightsync {

namespace {

const char* class_of(Scope scope) {
    switch (scope) {
        case Scope::kConfig:
            return "ConfigError";
        case Scope::kTransfer:
            return "TransferError";
        case Scope::kTimeout:
            return "TransferTimeoutError";
        case Scope::kQueuePair:
            return "QueuePairError";
        case Scope::kRail:
            return "RailError";
        case Scope::kPeer:
            return "PeerLostError";
        case Scope::kMemory:
            return "MemoryRegistrationError";
        case Scope::kFenced:
            return "FencedError";
        case Scope::kDtype:
            return "DtypeMismatchError";
        case Scope::kAuth:
            return "AuthError";
        case Scope::kInternal:
            return "InternalError";
    }
    return "InternalError";
}

bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing() != 0;
#else
    return _Py_IsFinalizing() != 0;
#endif
}

// Runs Python's signal handlers: Ctrl-C ends a blocking call as it would end time.sleep().
void on_slice() {
    if (is_finalizing()) {
        return;
    }
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) {
        throw py::error_already_set();
    }
}

// Messages may quote what a peer sent: never trusted to be UTF-8.
py::object to_text(const std::string& text) {
    return py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(
        text.data(), static_cast<py::ssize_t>(text.size()), "backslashreplace"));
}

struct ToPython {
    py::object operator()(std::int64_t value) const { return py::int_(value); }
    py::object operator()(const std::string& value) const { return to_text(value); }
    py::object operator()(const std::vector<std::int64_t>& value) const { return py::cast(value); }
};

}  // namespace

py::object to_exception(const Error& error) {
    py::dict context;
    for (const auto& [name, fact] : error.facts()) {
        context[py::str(name)] = std::visit(ToPython(), fact);
    }
    context["where"] = error.where();
    const py::object type = py::module_::import("weightsync.errors").attr(class_of(error.scope()));
    return type(to_text(error.detail()), **context);
}

std::shared_ptr<void> keep_alive(py::object object) {
    return std::shared_ptr<void>(new py::object(std::move(object)), [](void* owned) {
        if (is_finalizing()) {
            return;  // the interpreter is going, and the object with it
        }
        const py::gil_scoped_acquire gil;
        delete static_cast<py::object*>(owned);
    });
}

void bind_errors(py::module_& /*m*/) {
    py::register_local_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) {
                std::rethrow_exception(pointer);
            }
        } catch (const Error& error) {
            const py::object exception = to_exception(error);
            PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
        }
    });
    set_interrupt_hook(&on_slice);
}

}  // namespace weightsync
