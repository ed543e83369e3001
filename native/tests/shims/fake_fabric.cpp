// A libfabric that only remembers: what was posted, in which order. A write completes at once. It
// exports fi_fabric, and `fake` for the test to look at and to steer.
#include "fake_fabric.hpp"

#include <cerrno>
#include <cstring>

using namespace fi;

Fake fake;

namespace {

fi_ops fid_ops{sizeof(fi_ops), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
fi_ops endpoint_ops = fid_ops;
fi_ops_fabric fabric_ops{};
fi_ops_domain domain_ops{};
fi_ops_cq cq_ops{};
fi_ops_rma rma_ops{};
fid_domain domain{};

void connect() {
    fid_ep* made = nullptr;
    domain.ops->endpoint(&domain, nullptr, &made, nullptr);
    fake.is_connection_untouched = made->fid.ops == &endpoint_ops;
    made->fid.ops->bind(&made->fid, &fake.connects_by->fid, FI_TRANSMIT);
    made->fid.ops->close(&made->fid);
}

ssize_t add(Posted posted) {
    if (fake.connects_by != nullptr) {
        connect();
    }
    if (fake.num_busy > 0) {
        --fake.num_busy;
        return -EAGAIN;
    }
    if (posted.context != nullptr && posted.context == fake.refused) {
        return -ENOTCONN;
    }
    fake.posted.push_back(posted);
    fake.completions.push_back(posted.context);
    return 0;
}

ssize_t write(fid_ep*, const void*, std::size_t len, void*, fi_addr_t, std::uint64_t addr,
              std::uint64_t, void* context) {
    return add({'w', addr, len, 0, 0, context});
}

ssize_t writedata(fid_ep*, const void*, std::size_t len, void*, std::uint64_t data, fi_addr_t,
                  std::uint64_t addr, std::uint64_t, void* context) {
    return add({'d', addr, len, data, 0, context});
}

ssize_t writemsg(fid_ep*, const fi_msg_rma* m, std::uint64_t flags) {
    const std::size_t len = m->iov_count == 0 ? 0 : m->msg_iov[0].iov_len;
    return add({'m', m->rma_iov[0].addr, len, m->data, flags, m->context});
}

ssize_t read(fid_cq*, void* buffer, std::size_t count) {
    ++fake.num_reads;
    std::size_t n = 0;
    for (; n < count && !fake.completions.empty(); ++n) {
        static_cast<void**>(buffer)[n] = fake.completions.front();
        fake.completions.pop_front();
    }
    return n == 0 ? -EAGAIN : static_cast<ssize_t>(n);
}

ssize_t sread(fid_cq* cq, void* buffer, std::size_t count, const void*, int) {
    return read(cq, buffer, count);
}

ssize_t readerr(fid_cq*, fi_cq_err_entry*, std::uint64_t) {
    return -EAGAIN;
}

int bind(fid*, fid*, std::uint64_t) {
    return 0;
}

int close_endpoint(fid* self) {
    delete reinterpret_cast<fid_ep*>(self);
    return 0;
}

int close_queue(fid* self) {
    delete reinterpret_cast<fid_cq*>(self);
    return 0;
}

int open_endpoint(fid_domain*, fi_info*, fid_ep** ep, void*) {
    auto* made = new fid_ep{};
    made->fid.ops = &endpoint_ops;
    made->rma = &rma_ops;
    *ep = made;
    return 0;
}

int open_queue(fid_domain*, fi_cq_attr*, fid_cq** cq, void*) {
    auto* made = new fid_cq{};
    made->fid.ops = &fid_ops;
    made->ops = &cq_ops;
    *cq = made;
    return 0;
}

// As ofi_rxm does: a provider that opens one below itself. Nobody is to touch that one.
int open_domain(fid_fabric*, fi_info*, fid_domain** made, void*) {
    fid_fabric* below = nullptr;
    fi_fabric(nullptr, &below, nullptr);
    fake.is_inner_untouched = below->ops == &fabric_ops;
    domain.ops = &domain_ops;
    *made = &domain;
    return 0;
}

int trywait(fid_fabric*, fid**, int) {
    return 0;
}

}  // namespace

extern "C" int fi_fabric(fi_fabric_attr*, fid_fabric** made, void*) {
    fid_ops.close = close_queue;
    endpoint_ops.bind = bind;
    endpoint_ops.close = close_endpoint;
    fabric_ops = {sizeof fabric_ops, open_domain, nullptr, nullptr, nullptr, trywait};
    domain_ops = {sizeof domain_ops, nullptr, open_queue, open_endpoint};
    cq_ops = {sizeof cq_ops, read, nullptr, readerr, sread, nullptr};
    rma_ops.size = sizeof rma_ops;
    rma_ops.write = write;
    rma_ops.writedata = writedata;
    rma_ops.writemsg = writemsg;
    static std::deque<fid_fabric> all;
    *made = &all.emplace_back();
    (*made)->ops = &fabric_ops;
    return 0;
}
