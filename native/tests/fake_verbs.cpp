#include "fake_world.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <utility>
#include <vector>

namespace weightsync::test {

World* world = nullptr;

FakeDevice& device_of(int number) {
    return *world->devices.at(static_cast<std::size_t>(number));
}

void ring(int fd) {
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto rc = ::write(fd, &one, sizeof(one));
}

namespace {

using namespace weightsync::verbs;
namespace fs = std::filesystem;

bool take(int fd) {
    std::uint64_t value = 0;
    return ::read(fd, &value, sizeof(value)) == sizeof(value);
}

void complete(ibv_cq* queue, const ibv_wc& completion) {
    auto* cq = reinterpret_cast<FakeCq*>(queue);
    if (cq->entries.size() >= static_cast<std::size_t>(cq->raw.cqe)) {
        ++world->counts.full_completion_queues;
        return;
    }
    cq->entries.push_back(completion);
    if (cq->is_armed && cq->raw.channel != nullptr) {
        cq->is_armed = false;
        auto* channel = reinterpret_cast<FakeChannel*>(cq->raw.channel);
        channel->events.push_back(queue);
        ring(channel->raw.fd);
    }
}

ibv_wc completion_of(std::uint64_t id, const FakeQp& qp, ibv_wc_status status) {
    ibv_wc completion{};
    completion.wr_id = id;
    completion.status = status;
    completion.qp_num = qp.raw.qp_num;
    return completion;
}

void finish_send(FakeQp& qp, const ibv_send_wr& request, ibv_wc_status status) {
    ++qp.unsignalled;
    if ((request.send_flags & IBV_SEND_SIGNALED) == 0 && status == IBV_WC_SUCCESS) {
        return;
    }
    ibv_wc completion = completion_of(request.wr_id, qp, status);
    completion.opcode = request.opcode == IBV_WR_SEND_WITH_IMM ? IBV_WC_SEND : IBV_WC_RDMA_WRITE;
    qp.frees[request.wr_id] = qp.unsignalled;
    qp.unsignalled = 0;
    complete(qp.raw.send_cq, completion);
}

void to_error(FakeQp& qp) {
    qp.state = IBV_QPS_ERR;
    for (const Pending& pending : qp.held) {
        finish_send(qp, pending.request, IBV_WC_WR_FLUSH_ERR);
    }
    qp.held.clear();
    for (const std::uint64_t id : qp.receives) {
        complete(qp.raw.recv_cq, completion_of(id, qp, IBV_WC_WR_FLUSH_ERR));
    }
    qp.receives.clear();
}

bool holds(std::uint32_t key, std::uint64_t address, std::uint64_t nbytes, int access) {
    const auto found = world->mrs.find(key);
    if (found == world->mrs.end() || (found->second->access & access) != access) {
        return false;
    }
    const auto begin = reinterpret_cast<std::uint64_t>(found->second->raw.addr);
    return address >= begin && address + nbytes <= begin + found->second->raw.length;
}

// What happens at the peer; the status that the sender gets.
ibv_wc_status land(FakeQp& qp, const Pending& pending) {
    const ibv_send_wr& request = pending.request;
    const auto found = world->qps.find(qp.peer);
    if (found == world->qps.end() || !found->second->device->is_up || !qp.device->is_up ||
        found->second->state < IBV_QPS_RTR || found->second->state == IBV_QPS_ERR) {
        return IBV_WC_RETRY_EXC_ERR;
    }
    FakeQp& peer = *found->second;
    const std::uint64_t nbytes = request.num_sge == 0 ? 0 : pending.part.length;
    const bool is_write = request.opcode != IBV_WR_SEND_WITH_IMM;
    if (nbytes != 0 && !holds(pending.part.lkey, pending.part.addr, nbytes, 0)) {
        return IBV_WC_LOC_PROT_ERR;
    }
    if (is_write && nbytes != 0 &&
        !holds(request.rdma.rkey, request.rdma.remote_addr, nbytes, IBV_ACCESS_REMOTE_WRITE)) {
        to_error(peer);
        return IBV_WC_REM_ACCESS_ERR;
    }
    if (request.opcode != IBV_WR_RDMA_WRITE && peer.receives.empty()) {
        ++world->counts.missing_receives;
        return IBV_WC_RNR_RETRY_EXC_ERR;
    }
    FakeDevice& there = *peer.device;
    const bool is_arrival = request.opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
    if (nbytes != 0) {
        std::memcpy(reinterpret_cast<void*>(request.rdma.remote_addr),
                    reinterpret_cast<const void*>(pending.part.addr), nbytes);
    }
    if (is_write) {
        ++world->counts.writes;
    }
    if (is_arrival && there.arrival_failure && there.arrival_skip-- == 0) {
        complete(peer.raw.recv_cq,
                 completion_of(peer.receives.front(), peer, *there.arrival_failure));
        there.arrival_failure.reset();
        peer.receives.pop_front();
        to_error(peer);
        return IBV_WC_REM_OP_ERR;
    }
    if (request.opcode != IBV_WR_RDMA_WRITE) {
        ibv_wc completion = completion_of(peer.receives.front(), peer, IBV_WC_SUCCESS);
        peer.receives.pop_front();
        completion.opcode = is_write ? IBV_WC_RECV_RDMA_WITH_IMM : IBV_WC_RECV;
        completion.imm_data = request.imm_data;
        completion.wc_flags = IBV_WC_WITH_IMM;
        completion.byte_len = static_cast<std::uint32_t>(nbytes);
        complete(peer.raw.recv_cq, completion);
    }
    return IBV_WC_SUCCESS;
}

void execute(FakeQp& qp, const Pending& pending) {
    if (qp.state == IBV_QPS_ERR) {
        finish_send(qp, pending.request, IBV_WC_WR_FLUSH_ERR);
        return;
    }
    FakeDevice& device = *qp.device;
    ibv_wc_status status = IBV_WC_SUCCESS;
    const bool is_write = pending.request.opcode != IBV_WR_SEND_WITH_IMM;
    if (is_write && device.failure && device.skip-- == 0) {
        if (device.has_landed) {
            [[maybe_unused]] const auto ignored = land(qp, pending);
        }
        status = *device.failure;
        device.failure.reset();
    } else if (!is_write && device.message_failure) {
        status = *device.message_failure;
        device.message_failure.reset();
    } else {
        status = land(qp, pending);
    }
    finish_send(qp, pending.request, status);
    if (status != IBV_WC_SUCCESS) {
        to_error(qp);
    }
}

int post_send(ibv_qp* raw, ibv_send_wr* request, ibv_send_wr** failed) {
    const Lock lock(world->mutex);
    auto& qp = *reinterpret_cast<FakeQp*>(raw);
    FakeDevice& device = *qp.device;
    ++world->counts.doorbells;
    const bool is_refused = device.refusals > 0 && request->opcode != IBV_WR_SEND_WITH_IMM;
    int taken_left = device.refusal_taken;
    if (device.message_refusal != 0 && request->opcode == IBV_WR_SEND_WITH_IMM) {
        *failed = request;
        return std::exchange(device.message_refusal, 0);
    }
    if (is_refused) {
        --device.refusals;
    }
    for (; request != nullptr; request = request->next) {
        if (is_refused && taken_left-- == 0) {
            *failed = request;
            return device.refusal;
        }
        if (qp.state != IBV_QPS_RTS && qp.state != IBV_QPS_ERR) {
            *failed = request;
            return EINVAL;
        }
        if (qp.used == qp.cap.max_send_wr) {
            ++world->counts.full_send_queues;
            *failed = request;
            return ENOMEM;
        }
        ++qp.used;
        if ((request->send_flags & IBV_SEND_SIGNALED) != 0) {
            ++world->counts.signalled;
        }
        Pending pending{*request, {}};
        if (request->num_sge != 0) {
            pending.part = *request->sg_list;
        }
        if (device.is_holding && qp.state == IBV_QPS_RTS) {
            qp.held.push_back(pending);
        } else {
            execute(qp, pending);
        }
    }
    return 0;
}

int post_recv(ibv_qp* raw, ibv_recv_wr* request, ibv_recv_wr** failed) {
    const Lock lock(world->mutex);
    auto& qp = *reinterpret_cast<FakeQp*>(raw);
    if (qp.device->receive_refusal != 0) {
        *failed = request;
        return std::exchange(qp.device->receive_refusal, 0);
    }
    for (; request != nullptr; request = request->next) {
        if (qp.state == IBV_QPS_RESET || qp.receives.size() == qp.cap.max_recv_wr) {
            *failed = request;
            return qp.state == IBV_QPS_RESET ? EINVAL : ENOMEM;
        }
        if (qp.state == IBV_QPS_ERR) {
            complete(qp.raw.recv_cq, completion_of(request->wr_id, qp, IBV_WC_WR_FLUSH_ERR));
        } else {
            qp.receives.push_back(request->wr_id);
        }
    }
    return 0;
}

int poll_cq(ibv_cq* raw, int count, ibv_wc* completions) {
    const Lock lock(world->mutex);
    auto& cq = *reinterpret_cast<FakeCq*>(raw);
    if (reinterpret_cast<FakeContext*>(raw->context)->device->polls_fail) {
        return -1;
    }
    int taken = 0;
    for (; taken < count && !cq.entries.empty(); ++taken) {
        completions[taken] = cq.entries.front();
        cq.entries.pop_front();
        const auto qp = world->qps.find(completions[taken].qp_num);
        if (qp != world->qps.end()) {
            auto& frees = qp->second->frees;
            if (const auto found = frees.find(completions[taken].wr_id); found != frees.end()) {
                qp->second->used -= found->second;
                frees.erase(found);
            }
        }
    }
    return taken;
}

int req_notify_cq(ibv_cq* raw, int /*solicited_only*/) {
    const Lock lock(world->mutex);
    reinterpret_cast<FakeCq*>(raw)->is_armed = true;
    return 0;
}

ibv_device** get_device_list(int* count) {
    const Lock lock(world->mutex);
    *count = static_cast<int>(world->devices.size());
    auto** list = new ibv_device*[world->devices.size() + 1]();
    for (std::size_t i = 0; i < world->devices.size(); ++i) {
        list[i] = reinterpret_cast<ibv_device*>(world->devices[i].get());
    }
    return list;
}

ibv_context* open_device(ibv_device* raw) {
    const Lock lock(world->mutex);
    auto* context = new FakeContext;
    context->device = reinterpret_cast<FakeDevice*>(raw);
    context->raw.device = raw;
    context->raw.async_fd = ::eventfd(0, EFD_SEMAPHORE);
    context->raw.ops.poll_cq = &poll_cq;
    context->raw.ops.req_notify_cq = &req_notify_cq;
    context->raw.ops.post_send = &post_send;
    context->raw.ops.post_recv = &post_recv;
    context->device->contexts.push_back(context);
    return &context->raw;
}

int close_device(ibv_context* raw) {
    const Lock lock(world->mutex);
    auto* context = reinterpret_cast<FakeContext*>(raw);
    std::erase(context->device->contexts, context);
    ::close(context->raw.async_fd);
    delete context;
    return 0;
}

int get_async_event(ibv_context* raw, ibv_async_event* event) {
    const Lock lock(world->mutex);
    auto* context = reinterpret_cast<FakeContext*>(raw);
    if (!take(context->raw.async_fd)) {
        return -1;
    }
    *event = context->events.front();
    context->events.pop_front();
    return 0;
}

int query_device(ibv_context* /*raw*/, ibv_device_attr* attr) {
    *attr = {};
    attr->max_cqe = world->limits.max_cqe;
    attr->max_qp_wr = world->limits.max_qp_wr;
    attr->phys_port_cnt = 1;
    return 0;
}

int query_port(ibv_context* raw, std::uint8_t /*port*/, ibv_port_attr* attr) {
    const Lock lock(world->mutex);
    *attr = {};
    attr->state =
        reinterpret_cast<FakeContext*>(raw)->device->is_up ? IBV_PORT_ACTIVE : IBV_PORT_DOWN;
    attr->active_mtu = 5;
    attr->gid_tbl_len = 4;
    attr->pkey_tbl_len = 1;
    attr->max_msg_sz = world->limits.max_msg_sz;
    attr->link_layer = IBV_LINK_LAYER_ETHERNET;
    return 0;
}

int query_gid(ibv_context* /*raw*/, std::uint8_t /*port*/, int index, Gid* gid) {
    *gid = {};
    (*gid)[10] = (*gid)[11] = 0xFF;
    (*gid)[15] = static_cast<std::uint8_t>(1 + index);
    return 0;
}

int query_pkey(ibv_context* /*raw*/, std::uint8_t /*port*/, int /*index*/, std::uint16_t* pkey) {
    *pkey = 0xFFFF;
    return 0;
}

ibv_mr* make_mr(ibv_pd* pd, void* address, std::size_t nbytes, int access) {
    if (world->reg_mr_failures > 0) {
        --world->reg_mr_failures;
        errno = world->reg_mr_error;
        return nullptr;
    }
    ++world->counts.registrations;
    world->counts.relaxed += (access & IBV_ACCESS_RELAXED_ORDERING) != 0 ? 1 : 0;
    auto* mr = new FakeMr;
    mr->raw = {pd->context, pd, address, nbytes, 0, world->next_number, world->next_number};
    mr->access = access;
    world->mrs[world->next_number++] = mr;
    return &mr->raw;
}

ibv_mr* reg_mr(ibv_pd* pd, void* address, std::size_t nbytes, int access) {
    const Lock lock(world->mutex);
    const auto begin = reinterpret_cast<std::uint64_t>(address);
    if (begin < world->gpu_end && begin + nbytes > world->gpu_begin && !world->has_peermem) {
        errno = EFAULT;
        return nullptr;
    }
    return make_mr(pd, address, nbytes, access);
}

ibv_mr* reg_mr_iova2(ibv_pd* pd, void* address, std::size_t nbytes, std::uint64_t /*iova*/,
                     unsigned access) {
    return reg_mr(pd, address, nbytes, static_cast<int>(access));
}

ibv_mr* reg_dmabuf_mr(ibv_pd* pd, std::uint64_t offset, std::size_t nbytes, std::uint64_t iova,
                      int fd, int access) {
    const Lock lock(world->mutex);
    const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    if (world->dmabuf_error != 0 || ::fcntl(fd, F_GETFD) < 0 || offset % page != iova % page) {
        errno = world->dmabuf_error != 0 ? world->dmabuf_error : EINVAL;
        return nullptr;
    }
    ++world->counts.dmabufs;
    return make_mr(pd, reinterpret_cast<void*>(iova), nbytes, access);
}

int dereg_mr(ibv_mr* raw) {
    const Lock lock(world->mutex);
    world->mrs.erase(raw->lkey);
    delete reinterpret_cast<FakeMr*>(raw);
    return 0;
}

ibv_cq* create_cq(ibv_context* context, int entries, void* user, ibv_comp_channel* channel,
                  int /*vector*/) {
    if (entries > world->limits.max_cqe) {
        errno = EINVAL;
        return nullptr;
    }
    ++world->counts.completion_queues;
    auto* cq = new FakeCq;
    cq->raw = {context, channel, user, 0, entries};
    return &cq->raw;
}

int get_cq_event(ibv_comp_channel* raw, ibv_cq** cq, void** user) {
    const Lock lock(world->mutex);
    auto* channel = reinterpret_cast<FakeChannel*>(raw);
    if (!take(channel->raw.fd)) {
        return -1;
    }
    *cq = channel->events.front();
    *user = (*cq)->cq_context;
    channel->events.pop_front();
    return 0;
}

ibv_qp* create_qp(ibv_pd* pd, ibv_qp_init_attr* init) {
    const Lock lock(world->mutex);
    if (world->create_qp_failures > 0) {
        --world->create_qp_failures;
        errno = ENOMEM;
        return nullptr;
    }
    auto* qp = new FakeQp;
    qp->raw.context = pd->context;
    qp->raw.pd = pd;
    qp->raw.send_cq = init->send_cq;
    qp->raw.recv_cq = init->recv_cq;
    qp->raw.qp_num = world->next_number;
    qp->device = reinterpret_cast<FakeContext*>(pd->context)->device;
    qp->cap = init->cap;
    world->qps[world->next_number++] = qp;
    return &qp->raw;
}

int modify_qp(ibv_qp* raw, ibv_qp_attr* attr, int mask) {
    const Lock lock(world->mutex);
    auto& qp = *reinterpret_cast<FakeQp*>(raw);
    if (world->modify_failures > 0 && attr->qp_state == world->modify_state) {
        --world->modify_failures;
        return EINVAL;
    }
    if ((mask & IBV_QP_DEST_QPN) != 0) {
        qp.peer = attr->dest_qp_num;
    }
    if (attr->qp_state == IBV_QPS_ERR) {
        to_error(qp);
    } else if (attr->qp_state == IBV_QPS_RESET) {
        qp.receives.clear();
        qp.held.clear();
    }
    qp.state = attr->qp_state;
    return 0;
}

int destroy_qp(ibv_qp* raw) {
    const Lock lock(world->mutex);
    const bool is_failing = world->destroy_qp_failures > 0;
    if (is_failing) {
        --world->destroy_qp_failures;
    }
    world->qps.erase(raw->qp_num);
    delete reinterpret_cast<FakeQp*>(raw);
    return is_failing ? EBUSY : 0;
}

void write_file(const fs::path& path, const std::string& text) {
    fs::create_directories(path.parent_path());
    std::ofstream(path) << text << "\n";
}

void fill_table(Table& table) {
    table.get_device_list = &get_device_list;
    table.free_device_list = [](ibv_device** list) { delete[] list; };
    table.get_device_name = [](ibv_device* device) {
        return reinterpret_cast<FakeDevice*>(device)->name.c_str();
    };
    table.open_device = &open_device;
    table.close_device = &close_device;
    table.get_async_event = &get_async_event;
    table.ack_async_event = [](ibv_async_event*) {};
    table.query_device = &query_device;
    table.query_port = &query_port;
    table.query_gid = &query_gid;
    table.query_pkey = &query_pkey;
    table.alloc_pd = [](ibv_context* context) { return new ibv_pd{context, 0}; };
    table.dealloc_pd = [](ibv_pd* pd) {
        delete pd;
        return 0;
    };
    table.reg_mr = &reg_mr;
    table.reg_mr_iova2 = &reg_mr_iova2;
    table.reg_dmabuf_mr = &reg_dmabuf_mr;
    table.dereg_mr = &dereg_mr;
    table.create_comp_channel = [](ibv_context* context) {
        auto* channel = new FakeChannel;
        channel->raw = {context, ::eventfd(0, EFD_SEMAPHORE), 0};
        return &channel->raw;
    };
    table.destroy_comp_channel = [](ibv_comp_channel* raw) {
        ::close(raw->fd);
        delete reinterpret_cast<FakeChannel*>(raw);
        return 0;
    };
    table.create_cq = &create_cq;
    table.destroy_cq = [](ibv_cq* cq) {
        delete reinterpret_cast<FakeCq*>(cq);
        return 0;
    };
    table.get_cq_event = &get_cq_event;
    table.ack_cq_events = [](ibv_cq*, unsigned) {};
    table.create_qp = &create_qp;
    table.modify_qp = &modify_qp;
    table.destroy_qp = &destroy_qp;
    table.wc_status_str = [](ibv_wc_status status) {
        return status == IBV_WC_RETRY_EXC_ERR ? "transport retry counter exceeded" : "failed";
    };
}

}  // namespace

FakeVerbs::FakeVerbs(int num_devices, FakeLimits limits) {
    world = new World;
    world->limits = limits;
    std::string folder = (fs::temp_directory_path() / "weightsync-fake-XXXXXX").string();
    world->sysfs = ::mkdtemp(folder.data());
    for (int i = 0; i < num_devices; ++i) {
        auto device = std::make_unique<FakeDevice>();
        device->name = "fake" + std::to_string(i);
        const fs::path port =
            fs::path(world->sysfs) / "class" / "infiniband" / device->name / "ports" / "1";
        write_file(port / "state", "4: ACTIVE");
        write_file(port / "link_layer", "Ethernet");
        write_file(port / "rate", "100 Gb/sec (4X EDR)");
        write_file(port / "gids" / "0", "fe80:0000:0000:0000:0000:0000:0000:0001");
        write_file(port / "gids" / "1",
                   "0000:0000:0000:0000:0000:ffff:0a00:000" + std::to_string(i + 1));
        write_file(port / "gid_attrs" / "types" / "0", "RoCE v2");
        write_file(port / "gid_attrs" / "types" / "1", "RoCE v2");
        world->devices.push_back(std::move(device));
    }
    fill_table(world->table);
}

FakeVerbs::~FakeVerbs() {
    fs::remove_all(world->sysfs);
    delete world;
    world = nullptr;
}

const Table& FakeVerbs::table() const noexcept {
    return world->table;
}

const std::string& FakeVerbs::sysfs() const noexcept {
    return world->sysfs;
}

FakeCounts& FakeVerbs::counts() noexcept {
    return world->counts;
}

void FakeVerbs::hold_writes(int device, bool on) {
    const Lock lock(world->mutex);
    FakeDevice& one = device_of(device);
    one.is_holding = on;
    if (on) {
        return;
    }
    std::vector<FakeQp*> qps;
    for (const auto& [number, qp] : world->qps) {
        qps.push_back(qp);
    }
    for (FakeQp* qp : qps) {
        while (qp->device == &one && !qp->held.empty()) {
            const Pending pending = qp->held.front();
            qp->held.pop_front();
            execute(*qp, pending);
        }
    }
}

}  // namespace weightsync::test
