// Compares fi_abi.hpp with the real headers. Nothing to run: it compiles or it does not.
#include <rdma/fabric.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

namespace real {
constexpr auto kRma = FI_RMA, kWrite = FI_WRITE, kTransmit = FI_TRANSMIT, kMore = FI_MORE,
               kRemoteCqData = FI_REMOTE_CQ_DATA, kFence = FI_FENCE, kInject = FI_INJECT;
constexpr int kErrorAvailable = FI_EAVAIL;
}  // namespace real
#undef FI_RMA
#undef FI_WRITE
#undef FI_TRANSMIT
#undef FI_MORE
#undef FI_REMOTE_CQ_DATA
#undef FI_FENCE
#undef FI_INJECT

#include "fi_abi.hpp"

static_assert(real::kRma == fi::FI_RMA && real::kWrite == fi::FI_WRITE);
static_assert(real::kTransmit == fi::FI_TRANSMIT && real::kMore == fi::FI_MORE);
static_assert(real::kRemoteCqData == fi::FI_REMOTE_CQ_DATA && real::kFence == fi::FI_FENCE);
static_assert(real::kInject == fi::FI_INJECT && real::kErrorAvailable == fi::FI_EAVAIL);

#define SAME(type, member) static_assert(offsetof(::type, member) == offsetof(fi::type, member))
SAME(fi_ops, close);
SAME(fi_ops, bind);
SAME(fid, ops);
SAME(fi_ops_fabric, domain);
SAME(fi_ops_fabric, trywait);
SAME(fid_fabric, ops);
SAME(fi_ops_domain, cq_open);
SAME(fi_ops_domain, endpoint);
SAME(fid_domain, ops);
SAME(fi_cq_err_entry, op_context);
SAME(fi_cq_err_entry, flags);
SAME(fi_cq_err_entry, len);
SAME(fi_cq_err_entry, olen);
SAME(fi_cq_err_entry, err);
SAME(fi_cq_err_entry, prov_errno);
SAME(fi_cq_err_entry, err_data_size);
SAME(fi_ops_cq, read);
SAME(fi_ops_cq, readfrom);
SAME(fi_ops_cq, readerr);
SAME(fi_ops_cq, sread);
SAME(fi_ops_cq, sreadfrom);
SAME(fid_cq, ops);
SAME(fi_rma_iov, key);
static_assert(sizeof(::fi_rma_iov) == sizeof(fi::fi_rma_iov));
SAME(fi_msg_rma, msg_iov);
SAME(fi_msg_rma, desc);
SAME(fi_msg_rma, rma_iov);
SAME(fi_msg_rma, context);
SAME(fi_msg_rma, data);
SAME(fi_ops_rma, write);
SAME(fi_ops_rma, writemsg);
SAME(fi_ops_rma, writedata);
SAME(fid_ep, rma);
