// Python face of peer groups and of operations that span several peers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <span>
#include <string>
#include <utility>

#include <weightsync/group.hpp>
#include <weightsync/scatter.hpp>

#include "bindings.hpp"

namespace py = pybind11;

namespace weightsync {

namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

py::object to_object(const std::optional<Error>& error) {
    return error ? to_exception(*error) : py::none();
}

std::int64_t to_member(std::optional<std::int64_t> member) {
    if (member && *member < 0) {
        throw Error(Scope::kConfig, "member " + std::to_string(*member) + " is negative");
    }
    return member.value_or(PeerGroup::kAnyMember);
}

py::tuple to_tuple(const Message& message) {
    return py::make_tuple(
        message.member,
        py::bytes(reinterpret_cast<const char*>(message.bytes.data()), message.bytes.size()));
}

// Bytes of any object that offers them in one run; held while it lives.
class Borrowed {
  public:
    explicit Borrowed(const py::buffer& data) {
        if (PyObject_GetBuffer(data.ptr(), &view_, PyBUF_SIMPLE) != 0) {
            PyErr_Clear();
            throw Error(Scope::kConfig, "a message is bytes, or an object with contiguous bytes");
        }
    }
    ~Borrowed() { PyBuffer_Release(&view_); }
    Borrowed(const Borrowed&) = delete;
    Borrowed& operator=(const Borrowed&) = delete;
    [[nodiscard]] std::span<const std::byte> bytes() const noexcept {
        return {static_cast<const std::byte*>(view_.buf), static_cast<std::size_t>(view_.len)};
    }

  private:
    Py_buffer view_{};
};

template <class Send>
std::shared_ptr<Operation> send_with(const std::shared_ptr<PeerGroup>& group,
                                     const py::buffer& data, const Send& call) {
    const Borrowed borrowed(data);
    std::shared_ptr<Operation> operation;
    {
        const py::gil_scoped_release unlocked;
        operation = call(borrowed.bytes());
    }
    return operation ? with_parent(group, std::move(operation)) : nullptr;
}

void bind_operations(py::module_& m) {
    py::class_<ScatterOperation, std::shared_ptr<ScatterOperation>>(m, "ScatterOperation")
        .def_property_readonly("done", &ScatterOperation::is_done)
        .def_property_readonly("nbytes", &ScatterOperation::nbytes)
        .def_property_readonly("num_writes", &ScatterOperation::num_writes)
        .def_property_readonly(
            "error", [](const ScatterOperation& scatter) { return to_object(scatter.error()); })
        .def(
            "wait",
            [](const ScatterOperation& scatter, std::optional<double> timeout_s) {
                scatter.wait(to_deadline(timeout_s));
            },
            py::arg("timeout_s"), Unlocked());

    py::class_<BarrierRound, std::shared_ptr<BarrierRound>>(m, "BarrierRound")
        .def_property_readonly("number", &BarrierRound::number)
        .def_property_readonly("done", py::cpp_function(&BarrierRound::is_done, Unlocked()))
        .def_property_readonly("nbytes", [](const BarrierRound& /*round*/) { return 0; })
        .def_property_readonly("num_writes", &BarrierRound::num_writes)
        .def_property_readonly("error",
                               [](BarrierRound& round) {
                                   std::optional<Error> error;
                                   {
                                       const py::gil_scoped_release unlocked;
                                       error = round.error();
                                   }
                                   return to_object(error);
                               })
        .def(
            "wait",
            [](BarrierRound& round, std::optional<double> timeout_s) {
                round.wait(to_deadline(timeout_s));
            },
            py::arg("timeout_s"), Unlocked());
}

}  // namespace

void bind_groups(py::module_& m) {
    bind_operations(m);

    py::class_<PeerGroup, std::shared_ptr<PeerGroup>>(m, "PeerGroup")
        .def_property_readonly("index",
                               [](const PeerGroup& group) { return group.options().index; })
        .def_property_readonly("size", [](const PeerGroup& group) { return group.options().size; })
        .def_property_readonly("message_bytes",
                               [](const PeerGroup& group) { return group.options().message_bytes; })
        .def_property_readonly("window",
                               [](const PeerGroup& group) { return group.options().window; })
        .def_property_readonly("is_open", &PeerGroup::is_open)
        .def_property_readonly("descriptor",
                               [](const PeerGroup& group) {
                                   const auto bytes = group.descriptor();
                                   return py::bytes(reinterpret_cast<const char*>(bytes.data()),
                                                    bytes.size());
                               })
        .def(
            "connect",
            [](PeerGroup& group, std::int64_t member, const py::bytes& descriptor,
               std::optional<double> timeout_s) {
                const auto view = static_cast<std::string_view>(descriptor);
                const std::span bytes(reinterpret_cast<const std::byte*>(view.data()), view.size());
                const py::gil_scoped_release unlocked;
                group.connect(member, bytes, to_deadline(timeout_s));
            },
            py::arg("member"), py::arg("descriptor"), py::arg("timeout_s") = 30.0)
        .def("is_connected", &PeerGroup::is_connected, py::arg("member"))
        .def("start_barrier", &PeerGroup::start_barrier, Unlocked())
        .def(
            "barrier",
            [](PeerGroup& group, std::optional<double> timeout_s) {
                group.barrier(to_deadline(timeout_s));
            },
            py::arg("timeout_s"), Unlocked())
        .def(
            "send",
            [](const std::shared_ptr<PeerGroup>& group, std::int64_t member, const py::buffer& data,
               std::optional<double> timeout_s) {
                const Deadline deadline = to_deadline(timeout_s);
                return send_with(group, data, [&](std::span<const std::byte> bytes) {
                    return group->send(member, bytes, deadline);
                });
            },
            py::arg("member"), py::arg("data"), py::arg("timeout_s"))
        .def(
            "try_send",
            [](const std::shared_ptr<PeerGroup>& group, std::int64_t member,
               const py::buffer& data) {
                return send_with(group, data, [&](std::span<const std::byte> bytes) {
                    return group->try_send(member, bytes);
                });
            },
            py::arg("member"), py::arg("data"))
        .def("can_send", &PeerGroup::can_send, py::arg("member"), Unlocked())
        .def(
            "recv",
            [](PeerGroup& group, std::optional<double> timeout_s,
               std::optional<std::int64_t> member) {
                const Deadline deadline = to_deadline(timeout_s);
                const std::int64_t from = to_member(member);
                Message message;
                {
                    const py::gil_scoped_release unlocked;
                    message = group.receive(from, deadline);
                }
                return to_tuple(message);
            },
            py::arg("timeout_s"), py::arg("member") = py::none())
        .def(
            "try_recv",
            [](PeerGroup& group, std::optional<std::int64_t> member) -> py::object {
                const std::int64_t from = to_member(member);
                std::optional<Message> message;
                {
                    const py::gil_scoped_release unlocked;
                    message = group.try_receive(from);
                }
                return message ? py::object(to_tuple(*message)) : py::none();
            },
            py::arg("member") = py::none())
        .def(
            "can_recv",
            [](const PeerGroup& group, std::optional<std::int64_t> member) {
                return group.can_receive(to_member(member));
            },
            py::arg("member") = py::none())
        .def("close", &PeerGroup::close, Unlocked())
        .def("__enter__", [](std::shared_ptr<PeerGroup> self) { return self; })
        .def("__exit__", [](PeerGroup& group, const py::args& /*error*/) {
            const py::gil_scoped_release unlocked;
            group.close();
        });
}

}  // namespace weightsync
