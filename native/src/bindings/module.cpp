#include "bindings.hpp"

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native half of weightsync: fabric engine and CPU kernels. Use weightsync.transport.";
    weightsync::bind_errors(m);
    weightsync::bind_engine(m);
    weightsync::bind_groups(m);
    weightsync::bind_sim(m);
    weightsync::bind_verbs(m);
    weightsync::bind_kernels(m);
}
