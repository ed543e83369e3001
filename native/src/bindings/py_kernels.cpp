// Python face of the kernels: checks the tables, releases the GIL, calls.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <source_location>
#include <span>
#include <string>

#include "../kernels/digest.hpp"
#include "../kernels/fill.hpp"
#include "../kernels/isa.hpp"
#include "../kernels/pack.hpp"
#include "../kernels/pack_digest.hpp"
#include "../kernels/pool.hpp"
#include "bindings.hpp"

namespace py = pybind11;

namespace weightsync {

namespace {

using kernels::Isa;

[[noreturn]] void throw_config(const std::string& message,
                               std::source_location where = std::source_location::current()) {
    throw Error(Scope::kConfig, message, {}, where);
}

// The values of a C-contiguous array of exactly this dtype and shape (columns 0: one-dimensional;
// rows -1: any number). Nothing is converted: a copy would be a table that the caller does not own.
template <class Value>
std::span<const Value> table_values(const py::array& array, const std::string& name,
                                    py::ssize_t rows, py::ssize_t columns) {
    const bool is_shaped =
        columns == 0 ? array.ndim() == 1 : array.ndim() == 2 && array.shape(1) == columns;
    if (!py::isinstance<py::array_t<Value, py::array::c_style>>(array) || !is_shaped ||
        (rows >= 0 && array.shape(0) != rows)) {
        std::string shape = rows < 0 ? "(rows" : "(" + std::to_string(rows);
        shape += columns == 0 ? ",)" : ", " + std::to_string(columns) + ")";
        throw_config(name + " must be a C-contiguous array of dtype " +
                     std::string(py::str(py::dtype::of<Value>())) + " and shape " + shape +
                     ", not " + std::string(py::str(array.dtype())) + " of shape " +
                     std::string(py::str(array.attr("shape"))));
    }
    return {static_cast<const Value*>(array.data()), static_cast<std::size_t>(array.size())};
}

using RowCheck = const char* (*)(const std::int64_t*);

void check_rows(const char* call, std::span<const std::int64_t> table, std::int64_t columns,
                RowCheck check, Scope scope = Scope::kConfig) {
    const auto num_rows = static_cast<std::int64_t>(table.size()) / columns;
    for (std::int64_t row = 0; row < num_rows; ++row) {
        if (const char* problem = check(table.data() + row * columns)) {
            throw Error(scope, std::string(call) + ": row " + std::to_string(row) + ": " + problem,
                        {{"row", row}});
        }
    }
}

void check_pack_table(const char* call, std::span<const std::int64_t> table) {
    check_rows(call, table, kernels::kPackColumns, kernels::check_pack_row);
    check_rows(call, table, kernels::kPackColumns, kernels::check_pack_cast, Scope::kDtype);
}

void check_groups(const char* call, std::span<const std::int32_t> group, std::int64_t num_groups) {
    if (num_groups < 0) {
        throw_config(std::string(call) + ": num_groups is negative");
    }
    for (std::size_t row = 0; row < group.size(); ++row) {
        if (group[row] < 0 || group[row] >= num_groups) {
            throw_config(std::string(call) + ": row " + std::to_string(row) + ": group " +
                         std::to_string(group[row]) + " is not in 0.." +
                         std::to_string(num_groups - 1));
        }
    }
}

int check_threads(int threads) {
    if (threads < 1) {
        throw_config("threads must be at least 1, not " + std::to_string(threads));
    }
    return threads;
}

Isa check_isa(const std::string& name) {
    const auto isa = kernels::find_isa(name);
    if (!isa) {
        throw_config("isa '" + name + "' is unknown or not available here; see kernel_info()");
    }
    return *isa;
}

py::array_t<std::uint64_t> make_sums(std::int64_t num_groups) {
    py::array_t<std::uint64_t> sums(static_cast<py::ssize_t>(num_groups));
    std::fill_n(sums.mutable_data(), sums.size(), std::uint64_t{0});
    return sums;
}

void pack(const py::array& rows, int threads, const std::string& isa_name) {
    const auto table = table_values<std::int64_t>(rows, "rows", -1, kernels::kPackColumns);
    check_pack_table("pack", table);
    const Isa isa = check_isa(isa_name);
    check_threads(threads);
    const py::gil_scoped_release release;
    kernels::pack(table, threads, isa);
}

void fill(const py::array& rows, const py::array& codes, int threads) {
    const auto table = table_values<std::int64_t>(rows, "rows", -1, kernels::kFillColumns);
    const auto values = table_values<std::uint64_t>(codes, "codes", rows.shape(0), 0);
    check_rows("fill", table, kernels::kFillColumns, kernels::check_fill_row);
    check_threads(threads);
    const py::gil_scoped_release release;
    kernels::fill(table, values, threads);
}

std::int64_t check_fill(const py::array& rows, const py::array& codes, int threads) {
    const auto table = table_values<std::int64_t>(rows, "rows", -1, kernels::kFillColumns);
    const auto values = table_values<std::uint64_t>(codes, "codes", rows.shape(0), 0);
    check_rows("check_fill", table, kernels::kFillColumns, kernels::check_fill_row);
    check_threads(threads);
    const py::gil_scoped_release release;
    return kernels::check_fill(table, values, threads);
}

py::array_t<std::uint64_t> digest(const py::array& rows, const py::array& group,
                                  std::int64_t num_groups, int threads,
                                  const std::string& isa_name) {
    const auto table = table_values<std::int64_t>(rows, "rows", -1, kernels::kDigestColumns);
    const auto groups = table_values<std::int32_t>(group, "group", rows.shape(0), 0);
    check_rows("digest", table, kernels::kDigestColumns, kernels::check_digest_row);
    check_groups("digest", groups, num_groups);
    const Isa isa = check_isa(isa_name);
    check_threads(threads);
    py::array_t<std::uint64_t> sums = make_sums(num_groups);
    const std::span<std::uint64_t> out(sums.mutable_data(), static_cast<std::size_t>(sums.size()));
    {
        const py::gil_scoped_release release;
        kernels::digest(table, groups, out, threads, isa);
    }
    return sums;
}

py::array_t<std::uint64_t> pack_digest(const py::array& rows, const py::array& keys,
                                       const py::array& group, std::int64_t num_groups, int threads,
                                       const std::string& isa_name) {
    const auto table = table_values<std::int64_t>(rows, "rows", -1, kernels::kPackColumns);
    const auto key_table =
        table_values<std::int64_t>(keys, "keys", rows.shape(0), kernels::kPackKeyColumns);
    const auto groups = table_values<std::int32_t>(group, "group", rows.shape(0), 0);
    check_pack_table("pack_digest", table);
    check_rows("pack_digest", key_table, kernels::kPackKeyColumns, kernels::check_pack_keys);
    check_groups("pack_digest", groups, num_groups);
    const Isa isa = check_isa(isa_name);
    check_threads(threads);
    py::array_t<std::uint64_t> sums = make_sums(num_groups);
    const std::span<std::uint64_t> out(sums.mutable_data(), static_cast<std::size_t>(sums.size()));
    {
        const py::gil_scoped_release release;
        kernels::pack_digest(table, key_table, groups, out, threads, isa);
    }
    return sums;
}

py::dict kernel_info() {
    py::list isas;
    for (const Isa isa : kernels::available_isas()) {
        isas.append(std::string(kernels::isa_name(isa)));
    }
    py::dict info;
    info["isa"] = std::string(kernels::isa_name(kernels::best_isa()));
    info["isas"] = isas;
    info["num_processors"] = kernels::num_processors();
    return info;
}

}  // namespace

void bind_kernels(py::module_& module) {
    module.def("pack", &pack, py::arg("rows"), py::arg("threads") = 1, py::kw_only(),
               py::arg("isa") = "auto",
               "Copy every row (R, 16): a strided box to a strided box, cast where dtypes differ.");
    module.def("fill", &fill, py::arg("rows"), py::arg("codes"), py::arg("threads") = 1,
               "Write codes[r] into every element of row r (R, 10).");
    module.def("check_fill", &check_fill, py::arg("rows"), py::arg("codes"), py::arg("threads") = 1,
               "Index of the first row (R, 10) with an element unlike its code, or -1.");
    module.def("digest", &digest, py::arg("rows"), py::arg("group"), py::arg("num_groups"),
               py::arg("threads") = 1, py::kw_only(), py::arg("isa") = "auto",
               "Digests of the rows (R, 19), added up by group.");
    module.def("pack_digest", &pack_digest, py::arg("rows"), py::arg("keys"), py::arg("group"),
               py::arg("num_groups"), py::arg("threads") = 1, py::kw_only(),
               py::arg("isa") = "auto",
               "pack(rows), and the digests of what was written, in one pass over memory.");
    module.def("kernel_info", &kernel_info,
               "Instruction sets of this machine and the one in use; number of processors.");
}

}  // namespace weightsync
