// Python face of the verbs fabric.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include <weightsync/fabrics.hpp>

#include "../fabrics/verbs/verbs.hpp"
#include "bindings.hpp"

namespace py = pybind11;

namespace weightsync {

namespace {

const char* type_text(verbs::GidType type) {
    switch (type) {
        case verbs::GidType::kInfiniBand:
            return "InfiniBand";
        case verbs::GidType::kRoceV1:
            return "RoCE v1";
        case verbs::GidType::kRoceV2:
            return "RoCE v2";
    }
    return "unknown";
}

py::dict to_dict(const verbs::PortFacts& port) {
    py::dict result;
    result["device"] = port.device;
    result["port"] = port.port;
    result["is_active"] = port.is_active;
    result["state"] = port.state;
    result["link_layer"] = port.link_layer;
    result["gbit_per_s"] = port.gbit_per_s;
    result["numa_node"] = port.numa_node;
    result["interface"] = port.interface;
    result["pci_address"] = port.pci_address;
    py::list gpus;
    for (const verbs::GpuNearby& gpu : port.gpus) {
        gpus.append(py::make_tuple(gpu.address, verbs::to_text(gpu.distance)));
    }
    result["gpus"] = gpus;
    py::list gids;
    for (const verbs::GidEntry& entry : port.gids) {
        gids.append(py::make_tuple(entry.index, verbs::gid_text(entry), type_text(entry.type)));
    }
    result["gids"] = gids;
    const verbs::GidEntry* chosen = verbs::choose_gid(port);
    result["gid_index"] = chosen == nullptr ? -1 : chosen->index;
    return result;
}

}  // namespace

void bind_verbs(py::module_& m) {
    m.def(
        "open_verbs",
        [](std::string name, std::vector<std::string> devices, std::vector<std::string> addresses,
           int gid_index, std::uint16_t pkey, std::uint8_t traffic_class,
           std::uint8_t service_level, int mtu_bytes, std::uint8_t timeout,
           std::uint8_t retry_count, bool relaxed_ordering, const NearOptions& near) {
            VerbsOptions options;
            options.devices = std::move(devices);
            options.addresses = std::move(addresses);
            options.path.gid_index = gid_index;
            options.path.pkey = pkey;
            options.path.traffic_class = traffic_class;
            options.path.service_level = service_level;
            options.path.mtu_bytes = mtu_bytes;
            options.path.timeout = timeout;
            options.path.retry_count = retry_count;
            options.memory.relaxed_ordering = relaxed_ordering;
            return Engine::open(std::move(name), [&](EngineContext& context) {
                return make_behind(context, near, make_verbs_fabric(context, options));
            });
        },
        py::arg("name"), py::arg("devices"), py::arg("addresses"), py::arg("gid_index"),
        py::arg("pkey"), py::arg("traffic_class"), py::arg("service_level"), py::arg("mtu_bytes"),
        py::arg("timeout"), py::arg("retry_count"), py::arg("relaxed_ordering"), py::arg("near"),
        py::call_guard<py::gil_scoped_release>());
    m.def("verbs_problem", &verbs::why_unavailable);
    m.def(
        "rdma_ports",
        [](const std::string& sysfs) {
            py::list result;
            for (const verbs::PortFacts& port : verbs::list_ports(sysfs)) {
                result.append(to_dict(port));
            }
            return result;
        },
        py::arg("sysfs") = "/sys");
}

}  // namespace weightsync
