#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

#include <weightsync/sim.hpp>

#include "bindings.hpp"

namespace py = pybind11;

namespace weightsync {

void bind_sim(py::module_& m) {
    using Unlocked = py::call_guard<py::gil_scoped_release>;
    const SimFaults none;
    py::class_<SimWire, std::shared_ptr<SimWire>>(m, "SimWire")
        .def(py::init(&SimWire::make), py::arg("seed") = 0, py::kw_only(),
             py::arg("blocking") = true)
        .def(
            "open",
            [](std::shared_ptr<SimWire> wire, std::string name) {
                return Engine::open(std::move(name), [wire](EngineContext& context) {
                    return wire->attach(context);
                });
            },
            py::arg("name"))
        .def(
            "set_faults",
            [](SimWire& wire, const std::string& engine, bool reorder, double delay_s,
               double duplicate, double drop, double late, double late_s, double invisible,
               int rails, double resend) {
                wire.set_faults(engine, {reorder, delay_s, duplicate, drop, late, late_s, invisible,
                                         rails, resend});
            },
            py::arg("engine") = "", py::kw_only(), py::arg("reorder") = none.reorder,
            py::arg("delay_s") = none.delay_s, py::arg("duplicate") = none.duplicate,
            py::arg("drop") = none.drop, py::arg("late") = none.late,
            py::arg("late_s") = none.late_s, py::arg("invisible") = none.invisible,
            py::arg("rails") = none.rails, py::arg("resend") = none.resend)
        .def(
            "freeze",
            [](SimWire& wire, const std::string& engine, std::optional<int> rail) {
                if (rail && *rail < 0) {
                    throw Error(Scope::kConfig, "rails are numbered from 0");
                }
                wire.freeze(engine, rail.value_or(SimWire::kAllRails));
            },
            py::arg("engine"), py::arg("rail") = py::none(), Unlocked())
        .def("thaw", &SimWire::thaw, py::arg("engine"), Unlocked())
        .def("kill", &SimWire::kill, py::arg("engine"), Unlocked())
        .def("step", &SimWire::step, Unlocked())
        .def("run_until", &SimWire::run_until, py::arg("time_s"), Unlocked())
        .def("run", &SimWire::run, Unlocked())
        .def_property_readonly("now_s", &SimWire::now_s)
        .def_property_readonly("num_pending", &SimWire::num_pending)
        .def("counts", [](const SimWire& wire) {
            py::dict result;
            for (const auto& [name, count] : wire.counts()) {
                result[py::str(name)] = count;
            }
            return result;
        });
}

}  // namespace weightsync
