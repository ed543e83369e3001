// Python face of the engine: converts arguments, releases the GIL, calls.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include <weightsync/engine.hpp>
#include <weightsync/fabrics.hpp>
#include <weightsync/group.hpp>
#include <weightsync/scatter.hpp>

#include "bindings.hpp"

namespace py = pybind11;

namespace weightsync {

Deadline to_deadline(std::optional<double> timeout_s) {
    if (!timeout_s) {
        return Deadline::never();
    }
    if (!(*timeout_s >= 0)) {
        throw Error(Scope::kConfig, "timeout of " + std::to_string(*timeout_s) +
                                        " s: give seconds, 0 or more, or None");
    }
    return Deadline::after(*timeout_s);
}

std::uint64_t to_size(std::int64_t value, const char* name) {
    if (value < 0) {
        throw Error(Scope::kConfig,
                    std::string(name) + "=" + std::to_string(value) + " is negative");
    }
    return static_cast<std::uint64_t>(value);
}

std::vector<std::int64_t> to_int64(const py::object& values, const char* name) {
    const auto array = py::array::ensure(values);
    if (!array || array.ndim() != 1 ||
        (array.size() != 0 && array.dtype().kind() != 'i' && array.dtype().kind() != 'u')) {
        PyErr_Clear();
        throw Error(Scope::kConfig, std::string(name) + ": give a sequence of whole numbers");
    }
    const auto wide = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>(array);
    return {wide.data(), wide.data() + wide.size()};
}

std::vector<std::int32_t> to_int32(const py::object& values, const char* name) {
    const std::vector<std::int64_t> wide = to_int64(values, name);
    std::vector<std::int32_t> result(wide.size());
    for (std::size_t i = 0; i < wide.size(); ++i) {
        if (wide[i] < std::numeric_limits<std::int32_t>::min() ||
            wide[i] > std::numeric_limits<std::int32_t>::max()) {
            throw Error(Scope::kConfig,
                        std::string(name) + ": " + std::to_string(wide[i]) + " is out of range");
        }
        result[i] = static_cast<std::int32_t>(wide[i]);
    }
    return result;
}

std::span<const Write> to_rows(const py::array& writes) {
    if (!py::isinstance<py::array_t<std::int64_t, py::array::c_style>>(writes) ||
        writes.ndim() != 2 || writes.shape(1) != 4) {
        throw Error(Scope::kConfig,
                    "writes must be a C-contiguous int64 array of shape (W, 4): source address, "
                    "destination offset, bytes, immediate or -1");
    }
    return {static_cast<const Write*>(writes.data()), static_cast<std::size_t>(writes.shape(0))};
}

namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

py::bytes to_bytes(const std::vector<std::byte>& bytes) {
    return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

// Counters [begin, end] by name.
template <class Counts>
py::dict to_dict(const Counts& counts, Count begin = Count::kOperations,
                 Count end = Count::kFences) {
    py::dict result;
    for (auto i = static_cast<std::size_t>(begin); i <= static_cast<std::size_t>(end); ++i) {
        result[py::str(std::string(kCountNames[i]))] = counts[i];
    }
    return result;
}

RangeRequest to_range(const py::handle& item) {
    const auto fields = py::reinterpret_borrow<py::object>(item).cast<py::tuple>();
    if (fields.size() != 4) {
        throw Error(Scope::kConfig, "a range is (arena_offset, Lease or Memory, offset, nbytes)");
    }
    RangeRequest range;
    range.arena_offset = to_size(fields[0].cast<std::int64_t>(), "arena_offset");
    range.offset = to_size(fields[2].cast<std::int64_t>(), "offset");
    range.nbytes = to_size(fields[3].cast<std::int64_t>(), "nbytes");
    const py::object memory = fields[1];
    if (py::isinstance<Memory>(memory)) {
        const auto& shared = memory.cast<const Memory&>();
        range.lease = shared.lease();
        range.block = shared.block();
    } else if (py::isinstance<Lease>(memory)) {
        range.lease = memory.cast<const Lease&>().state();
    } else {
        throw Error(Scope::kConfig, "a range needs a Lease or a Memory of this engine");
    }
    return range;
}

std::shared_ptr<Target> export_target(Engine& engine, const py::sequence& ranges,
                                      const py::object& slots, int chunk_bits,
                                      std::int64_t generation) {
    std::vector<RangeRequest> requests;
    for (const py::handle item : ranges) {
        requests.push_back(to_range(item));
    }
    const std::vector<std::int32_t> num_chunks = to_int32(slots, "slots");
    const std::uint64_t number = to_size(generation, "generation");
    const py::gil_scoped_release unlocked;
    return engine.export_target(std::move(requests), num_chunks, chunk_bits, number);
}

std::shared_ptr<Operation> post(const std::shared_ptr<Remote>& remote, const py::array& writes) {
    const std::span<const Write> rows = to_rows(writes);
    std::shared_ptr<Operation> operation;
    {
        const py::gil_scoped_release unlocked;
        operation = remote->post(rows);
    }
    return with_parent(remote, std::move(operation));
}

Pages to_pages(const py::tuple& pages, const char* side, std::vector<std::int64_t>& indices) {
    constexpr std::size_t kFields = 3;
    if (pages.size() != kFields) {
        throw Error(Scope::kConfig, std::string(side) + ": pages are (indices, stride, offset)");
    }
    for (const std::size_t field : {1, 2}) {
        if (PyIndex_Check(py::object(pages[field]).ptr()) == 0) {
            throw Error(Scope::kConfig,
                        std::string(side) + ": stride and offset are whole numbers");
        }
    }
    indices = to_int64(pages[0], side);
    return {indices, pages[1].cast<std::int64_t>(),
            to_size(pages[2].cast<std::int64_t>(), "offset")};
}

std::shared_ptr<Operation> write_paged(const std::shared_ptr<Remote>& remote,
                                       std::int64_t page_bytes, const py::tuple& source,
                                       const py::tuple& destination, const py::object& immediates) {
    std::array<std::vector<std::int64_t>, 3> lists;
    PagedWrite pages;
    pages.page_bytes = to_size(page_bytes, "page_bytes");
    pages.source = to_pages(source, "source", lists[0]);
    pages.destination = to_pages(destination, "destination", lists[1]);
    if (PyIndex_Check(immediates.ptr()) != 0 && !py::isinstance<py::array>(immediates)) {
        pages.first_immediate = immediates.cast<std::int64_t>();
    } else if (!immediates.is_none()) {
        lists[2] = to_int64(immediates, "immediates");
        pages.immediates = lists[2];
        if (lists[2].empty() && !lists[0].empty()) {
            throw Error(Scope::kConfig, "immediates: give one for each page, the first, or None");
        }
    }
    std::shared_ptr<Operation> operation;
    {
        const py::gil_scoped_release unlocked;
        operation = remote->write_paged(pages);
    }
    return with_parent(remote, std::move(operation));
}

void notify(Remote& remote, const py::object& immediates, std::int64_t nbytes) {
    const std::vector<std::int32_t> numbers = to_int32(immediates, "immediates");
    const std::uint64_t stored = to_size(nbytes, "nbytes");
    const py::gil_scoped_release unlocked;
    remote.notify(numbers, stored);
}

void wait_slots(Target& target, const py::object& slots, std::optional<double> timeout_s) {
    const std::vector<std::int32_t> numbers = to_int32(slots, "slots");
    const py::gil_scoped_release unlocked;
    target.wait(numbers, to_deadline(timeout_s));
}

void reset_slots(Target& target, const py::object& slots) {
    const std::vector<std::int32_t> numbers = to_int32(slots, "slots");
    const py::gil_scoped_release unlocked;  // a fence on another thread may take its time
    target.reset(numbers);
}

std::shared_ptr<ScatterOperation> scatter(Engine& engine, const py::sequence& remotes,
                                          const py::array& writes, const py::object& peers) {
    std::vector<std::shared_ptr<Remote>> to;
    for (const py::handle remote : remotes) {
        to.push_back(remote.cast<std::shared_ptr<Remote>>());
    }
    const std::span<const Write> rows = to_rows(writes);
    const std::vector<std::int32_t> numbers = to_int32(peers, "peers");
    const py::gil_scoped_release unlocked;
    return engine.scatter(to, rows, numbers);
}

std::shared_ptr<PeerGroup> open_group(Engine& engine, std::uint32_t index, std::uint32_t size,
                                      std::int64_t generation, std::uint32_t message_bytes,
                                      std::uint32_t window) {
    const GroupOptions options{index, size, to_size(generation, "generation"), message_bytes,
                               window};
    const py::gil_scoped_release unlocked;
    return engine.open_group(options);
}

void bind_memory(py::module_& m) {
    py::class_<Memory, std::shared_ptr<Memory>>(m, "Memory", py::buffer_protocol())
        .def_buffer([](Memory& memory) {
            return py::buffer_info(reinterpret_cast<std::uint8_t*>(memory.data()),
                                   static_cast<py::ssize_t>(memory.nbytes()), false);
        })
        .def_property_readonly(
            "address",
            [](const Memory& memory) { return reinterpret_cast<std::uintptr_t>(memory.data()); })
        .def_property_readonly("nbytes", &Memory::nbytes)
        .def("__len__", &Memory::nbytes);

    py::class_<Lease, std::shared_ptr<Lease>>(m, "Lease")
        .def_property_readonly("address", [](const Lease& lease) { return lease.state()->address; })
        .def_property_readonly("nbytes", [](const Lease& lease) { return lease.state()->nbytes; })
        .def(
            "release",
            [](Lease& lease, std::optional<double> timeout_s) {
                lease.release(to_deadline(timeout_s));
            },
            py::arg("timeout_s") = 10.0, Unlocked());
}

void bind_operation(py::module_& m) {
    py::class_<Operation, std::shared_ptr<Operation>>(m, "Operation")
        .def_property_readonly("done", &Operation::is_done)
        .def_property_readonly("nbytes", &Operation::nbytes)
        .def_property_readonly("num_writes",
                               [](const Operation& operation) { return operation.rows().size(); })
        .def_property_readonly("error",
                               [](const Operation& operation) -> py::object {
                                   const Error* error = operation.error();
                                   return error == nullptr ? py::none() : to_exception(*error);
                               })
        .def(
            "wait",
            [](Operation& operation, std::optional<double> timeout_s) {
                operation.wait(to_deadline(timeout_s));
            },
            py::arg("timeout_s"), Unlocked());
}

void bind_target(py::module_& m) {
    py::class_<Target, std::shared_ptr<Target>>(m, "Target")
        .def_property_readonly("descriptor",
                               [](const Target& target) { return to_bytes(target.descriptor()); })
        .def_property_readonly("generation", &Target::generation)
        .def_property_readonly("num_slots", &Target::num_slots)
        .def_property_readonly("is_open", &Target::is_open)
        .def("wait", &wait_slots, py::arg("slots"), py::arg("timeout_s"))
        .def(
            "is_complete",
            [](const Target& target, const py::object& slots) {
                return target.is_complete(to_int32(slots, "slots"));
            },
            py::arg("slots"))
        .def(
            "poll",
            [](Target& target, std::optional<double> timeout_s) {
                return target.poll(to_deadline(timeout_s));
            },
            py::arg("timeout_s") = 0.0, Unlocked())
        .def("missing", &Target::missing, py::arg("slot"), Unlocked())
        .def("reset", &reset_slots, py::arg("slots"))
        .def("expect_count", &Target::expect_count, py::arg("counter"), py::arg("count"),
             Unlocked())
        .def("count", &Target::count, py::arg("counter"))
        .def("flush", &Target::flush, Unlocked())
        .def("fence", &Target::fence, py::arg("discard") = false, Unlocked())
        .def("close", &Target::close, Unlocked())
        .def("counters",
             [](const Target& target) {
                 return to_dict(target.counters(), Count::kArrivals, Count::kWakeups);
             })
        .def("__enter__", [](std::shared_ptr<Target> self) { return self; })
        .def("__exit__", [](Target& target, const py::args& /*error*/) {
            const py::gil_scoped_release unlocked;
            target.close();
        });
}

void bind_remote(py::module_& m) {
    py::class_<Remote, std::shared_ptr<Remote>>(m, "Remote")
        .def_property_readonly("peer", [](const Remote& remote) { return remote.info().peer; })
        .def_property_readonly("generation",
                               [](const Remote& remote) { return remote.info().generation; })
        .def_property_readonly(
            "nbytes", [](const Remote& remote) { return remote.info().ranges.arena_nbytes(); })
        .def_property_readonly("address",
                               [](const Remote& remote) -> std::optional<std::uint64_t> {
                                   const std::uint64_t address = remote.mapped_address();
                                   return address == 0 ? std::nullopt : std::optional(address);
                               })
        .def_property_readonly("is_open", &Remote::is_open)
        .def("post", &post, py::arg("writes"))
        .def("write_paged", &write_paged, py::arg("page_bytes"), py::arg("source"),
             py::arg("destination"), py::arg("immediates") = py::none())
        .def("notify", &notify, py::arg("immediates"), py::arg("nbytes") = 0)
        .def("counters",
             [](const Remote& remote) {
                 return to_dict(remote.info().counters.read(), Count::kOperations,
                                Count::kNotifies);
             })
        .def("close", &Remote::close, Unlocked())
        .def("__enter__", [](std::shared_ptr<Remote> self) { return self; })
        .def("__exit__", [](Remote& remote, const py::args& /*error*/) {
            const py::gil_scoped_release unlocked;
            remote.close();
        });
}

}  // namespace

void bind_engine(py::module_& m) {
    bind_memory(m);
    bind_operation(m);
    bind_target(m);
    bind_remote(m);

    py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
        .def_property_readonly("name", &Engine::name)
        .def_property_readonly(
            "fabric", [](const Engine& engine) { return std::string(engine.fabric_name()); })
        .def_property_readonly("is_open", &Engine::is_open)
        .def_property_readonly("is_driven", &Engine::is_driven)
        .def_property_readonly("progress_fd", &Engine::progress_fd)
        .def(
            "allocate",
            [](Engine& engine, std::int64_t nbytes, bool prefault) {
                return engine.allocate(to_size(nbytes, "nbytes"), prefault);
            },
            py::arg("nbytes"), py::kw_only(), py::arg("prefault") = true, Unlocked())
        .def(
            "register",
            [](Engine& engine, std::uint64_t address, std::int64_t nbytes, py::object owner) {
                auto kept = keep_alive(std::move(owner));
                const std::uint64_t size = to_size(nbytes, "nbytes");
                const py::gil_scoped_release unlocked;
                return engine.add_lease(address, size, std::move(kept));
            },
            py::arg("address"), py::arg("nbytes"), py::arg("owner") = py::none())
        .def("export", &export_target, py::arg("ranges"), py::arg("slots"), py::arg("chunk_bits"),
             py::arg("generation"))
        .def(
            "connect",
            [](Engine& engine, const py::bytes& descriptor, std::optional<double> timeout_s) {
                const auto view = static_cast<std::string_view>(descriptor);
                const std::span bytes(reinterpret_cast<const std::byte*>(view.data()), view.size());
                const py::gil_scoped_release unlocked;
                return engine.connect(bytes, to_deadline(timeout_s));
            },
            py::arg("descriptor"), py::arg("timeout_s") = 30.0)
        .def("scatter", &scatter, py::arg("remotes"), py::arg("writes"), py::arg("peers"))
        .def("open_group", &open_group, py::arg("index"), py::arg("size"), py::kw_only(),
             py::arg("generation") = 0, py::arg("message_bytes") = 4096, py::arg("window") = 8)
        .def("counters", [](Engine& engine) { return to_dict(engine.counters()); })
        .def("rails",
             [](Engine& engine) {
                 py::list result;
                 for (const RailInfo& rail : engine.rails()) {
                     py::dict info;
                     info["name"] = rail.name;
                     info["address"] = rail.address;
                     info["state"] = rail.state;
                     info["bytes_out"] = rail.bytes_out;
                     info["bytes_in"] = rail.bytes_in;
                     info["outstanding"] = rail.outstanding;
                     result.append(std::move(info));
                 }
                 return result;
             })
        .def("arm", &Engine::arm, py::arg("on"))
        .def("drain_progress", &Engine::drain_progress)
        .def("drive", &Engine::drive, Unlocked())
        .def("close", &Engine::close, Unlocked())
        .def("__enter__", [](std::shared_ptr<Engine> self) { return self; })
        .def("__exit__", [](Engine& engine, const py::args& /*error*/) {
            const py::gil_scoped_release unlocked;
            engine.close();
        });

    py::class_<NearOptions>(m, "Near").def(py::init([](std::string fabric, int num_threads) {
                                               return NearOptions{std::move(fabric), num_threads};
                                           }),
                                           py::arg("fabric"), py::arg("num_threads"));

    m.def(
        "open_local",
        [](std::string name, int num_threads) {
            return Engine::open(std::move(name), [num_threads](EngineContext& context) {
                return make_local_fabric(context, {.num_threads = num_threads});
            });
        },
        py::arg("name"), py::arg("num_threads"), Unlocked());
    m.def(
        "open_cuda_ipc",
        [](std::string name, int num_threads) {
            return Engine::open(std::move(name), [num_threads](EngineContext& context) {
                return make_cuda_ipc_fabric(context, {.num_threads = num_threads});
            });
        },
        py::arg("name"), py::arg("num_threads"), Unlocked());
    m.def(
        "open_ofi",
        [](std::string name, std::string provider, std::vector<std::string> addresses,
           std::vector<std::string> domains, bool trusted_network, bool register_sources,
           const NearOptions& near) {
            const OfiOptions options{std::move(provider), std::move(addresses), std::move(domains),
                                     trusted_network, register_sources};
            return Engine::open(std::move(name), [&](EngineContext& context) {
                return make_behind(context, near, make_ofi_fabric(context, options));
            });
        },
        py::arg("name"), py::arg("provider"), py::arg("addresses"), py::arg("domains"),
        py::arg("trusted_network"), py::arg("register_sources"), py::arg("near"), Unlocked());
    m.def(
        "open_tcp",
        [](std::string name, std::vector<std::string> addresses, int num_streams,
           std::uint64_t window_bytes, const NearOptions& near) {
            const TcpOptions options{std::move(addresses), num_streams, window_bytes};
            return Engine::open(std::move(name), [&](EngineContext& context) {
                return make_behind(context, near, make_tcp_fabric(context, options));
            });
        },
        py::arg("name"), py::arg("addresses"), py::arg("num_streams"), py::arg("window_bytes"),
        py::arg("near"), Unlocked());
    m.def("live_object_count", &live_object_count);
    m.def("live_objects", [] {
        py::dict result;
        for (std::size_t i = 0; i < kKindNames.size(); ++i) {
            result[py::str(std::string(kKindNames[i]))] = live_count(static_cast<Kind>(i));
        }
        return result;
    });
}

}  // namespace weightsync
