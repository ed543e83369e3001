#include "resources.hpp"

#include <fcntl.h>

#include <cerrno>
#include <cstdlib>

namespace weightsync::verbs {

namespace {

// Objects of the library that live: every constructor below counts up when it has succeeded.
void created() noexcept {
    count_live(Kind::kVerbs, 1);
}

void destroyed(const char* call, int error) noexcept {
    if (error == 0) {
        count_live(Kind::kVerbs, -1);
        return;
    }
    try {
        report(std::string("verbs fabric: ") + call + ": " + errno_text(std::abs(error)) +
               "; the object is lost until the process ends");
    } catch (...) {
        report("verbs fabric: an object could not be destroyed");
    }
}

// errno of a function that returned null; some leave it alone.
int last_error() noexcept {
    return errno == 0 ? EIO : errno;
}

void set_nonblocking(int fd) {
    const int flags = ::fcntl(fd, F_GETFL);
    if (flags < 0 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) {
        throw verbs_error("fcntl", errno);
    }
}

}  // namespace

Error verbs_error(std::string_view call, int error, std::string_view advice,
                  std::source_location where) {
    return os_error(Scope::kRail, call, std::abs(error), advice, where);
}

Context::Context(const Table& table, const std::string& device) : table_(table), device_(device) {
    int num_devices = 0;
    errno = 0;
    ibv_device** list = table_.get_device_list(&num_devices);
    if (list == nullptr) {
        throw verbs_error("ibv_get_device_list", last_error(),
                          "no RDMA stack: is the ib_uverbs kernel module loaded?");
    }
    std::string found;
    for (int i = 0; i < num_devices; ++i) {
        const std::string name = table_.get_device_name(list[i]);
        found += (found.empty() ? "" : ", ") + name;
        if (name == device) {
            errno = 0;
            raw_ = table_.open_device(list[i]);
            break;
        }
    }
    const int error = last_error();
    const bool is_known = found == device || found.ends_with(", " + device);
    table_.free_device_list(list);
    if (raw_ == nullptr && !is_known) {
        throw Error(Scope::kConfig, "there is no RDMA device " + device + "; libibverbs finds " +
                                        (found.empty() ? "none" : found));
    }
    if (raw_ == nullptr) {
        throw verbs_error("ibv_open_device " + device, error,
                          "check access to /dev/infiniband/uverbs*");
    }
    created();
    try {
        set_nonblocking(raw_->async_fd);
    } catch (...) {
        destroyed("ibv_close_device", table_.close_device(raw_));
        throw;
    }
}

Context::~Context() {
    destroyed("ibv_close_device", table_.close_device(raw_));
}

ibv_device_attr Context::query_device() const {
    ibv_device_attr attr{};
    if (const int error = table_.query_device(raw_, &attr); error != 0) {
        throw verbs_error("ibv_query_device " + device_, error);
    }
    return attr;
}

ibv_port_attr Context::query_port(std::uint8_t port) const {
    ibv_port_attr attr{};
    if (const int error = table_.query_port(raw_, port, &attr); error != 0) {
        throw verbs_error("ibv_query_port " + device_ + " port " + std::to_string(port), error);
    }
    return attr;
}

ProtectionDomain::ProtectionDomain(std::shared_ptr<Context> context, MemoryOptions memory)
    : context_(std::move(context)), memory_(std::move(memory)) {
    errno = 0;
    raw_ = table().alloc_pd(context_->get());
    if (raw_ == nullptr) {
        throw verbs_error("ibv_alloc_pd", last_error());
    }
    created();
}

ProtectionDomain::~ProtectionDomain() {
    destroyed("ibv_dealloc_pd", table().dealloc_pd(raw_));
}

Registration::Registration(std::shared_ptr<ProtectionDomain> domain, std::uint64_t address,
                           std::uint64_t nbytes, Access access)
    : domain_(std::move(domain)) {
    const MemoryOptions& options = domain_->memory();
    Request request{address, nbytes, 0};
    // The library wants the right to write locally wherever a peer may write. Never the right to
    // read remotely: nobody reads.
    if (access == Access::kWriteRemotely) {
        request.access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
    }
    if (options.relaxed_ordering) {
        request.access |= IBV_ACCESS_RELAXED_ORDERING;
    }
    std::string no_dmabuf;  // of GPU memory: why
    if (const cuda::Driver* gpu = options.gpu_driver();
        gpu != nullptr && cuda::is_gpu_memory(*gpu, address)) {
        DmaBuf buffer = export_dmabuf(*gpu, address, nbytes);
        if (buffer.fd) {
            raw_ = pin_dmabuf(request, buffer);
        }
        no_dmabuf = buffer.problem;
    }
    if (raw_ == nullptr) {
        raw_ = pin(request);
    }
    if (raw_ == nullptr) {
        refuse(request, last_error(), no_dmabuf);
    }
    created();
}

ibv_mr* Registration::pin(const Request& request) const {
    const Table& table = domain_->table();
    auto* pointer = reinterpret_cast<void*>(request.address);
    ibv_mr* made = nullptr;
    if (table.reg_mr_iova2 != nullptr) {
        errno = 0;
        made = table.reg_mr_iova2(domain_->get(), pointer, request.nbytes, request.address,
                                  static_cast<unsigned>(request.access));
    }
    if (made == nullptr) {
        errno = 0;
        made = table.reg_mr(domain_->get(), pointer, request.nbytes,
                            request.access & ~IBV_ACCESS_RELAXED_ORDERING);
    }
    return made;
}

// The mapping keeps the buffer: its descriptor may be closed afterwards.
ibv_mr* Registration::pin_dmabuf(const Request& request, DmaBuf& buffer) const {
    const Table& table = domain_->table();
    if (table.reg_dmabuf_mr == nullptr) {
        buffer.problem = "this libibverbs takes none: rdma-core 34 does";
        return nullptr;
    }
    errno = 0;
    ibv_mr* made = table.reg_dmabuf_mr(domain_->get(), buffer.offset, request.nbytes,
                                       request.address, buffer.fd.get(), request.access);
    if (made == nullptr) {
        const int error = last_error();
        buffer.problem = "ibv_reg_dmabuf_mr: " + errno_text(error) +
                         (error == EOPNOTSUPP || error == EPROTONOSUPPORT
                              ? ": Linux 5.12 and a NIC such as ConnectX-5 are needed"
                              : "");
    }
    return made;
}

void Registration::refuse(const Request& request, int error, const std::string& no_dmabuf) const {
    const std::string size = std::to_string(request.nbytes) + " bytes";
    const std::string device = " on " + domain_->context()->device();
    if (no_dmabuf.empty()) {
        throw os_error(Scope::kMemory, "ibv_reg_mr of " + size + device, error,
                       error == EFAULT
                           ? "the memory is not all mapped"
                           : "check `ulimit -l` (memory must be lockable) and free memory");
    }
    const bool is_loaded = has_peermem(domain_->memory().sysfs);
    throw os_error(
        Scope::kMemory, "ibv_reg_mr of " + size + " of GPU memory" + device, error,
        "no dma-buf (" + no_dmabuf + "), and the kernel module nvidia_peermem " +
            (is_loaded ? "refuses; see the kernel log" : "is not loaded: modprobe nvidia_peermem"));
}

Registration::~Registration() {
    destroyed("ibv_dereg_mr", domain_->table().dereg_mr(raw_));
}

CompletionChannel::CompletionChannel(std::shared_ptr<Context> context)
    : context_(std::move(context)) {
    errno = 0;
    raw_ = table().create_comp_channel(context_->get());
    if (raw_ == nullptr) {
        throw verbs_error("ibv_create_comp_channel", last_error());
    }
    created();
    try {
        set_nonblocking(raw_->fd);
    } catch (...) {
        destroyed("ibv_destroy_comp_channel", table().destroy_comp_channel(raw_));
        throw;
    }
}

CompletionChannel::~CompletionChannel() {
    destroyed("ibv_destroy_comp_channel", table().destroy_comp_channel(raw_));
}

void CompletionChannel::drain() noexcept {
    ibv_cq* cq = nullptr;
    void* ignored = nullptr;
    while (table().get_cq_event(raw_, &cq, &ignored) == 0) {
        table().ack_cq_events(cq, 1);
    }
}

CompletionQueue::CompletionQueue(std::shared_ptr<CompletionChannel> channel,
                                 std::uint32_t num_entries)
    : channel_(std::move(channel)) {
    errno = 0;
    raw_ = table().create_cq(channel_->context()->get(), static_cast<int>(num_entries), nullptr,
                             channel_->get(), 0);
    if (raw_ == nullptr) {
        throw verbs_error("ibv_create_cq of " + std::to_string(num_entries) + " entries",
                          last_error());
    }
    created();
}

CompletionQueue::~CompletionQueue() {
    channel_->drain();  // unacknowledged events would block the next call for ever
    destroyed("ibv_destroy_cq", table().destroy_cq(raw_));
}

bool CompletionQueue::reserve(std::uint32_t num_entries) noexcept {
    // What it really has, which is what was asked for or more.
    const auto capacity = static_cast<std::uint32_t>(raw_->cqe);
    if (num_entries > capacity || reserved_ > capacity - num_entries) {
        return false;
    }
    reserved_ += num_entries;
    return true;
}

int CompletionQueue::poll(std::span<ibv_wc> completions) {
    const int count =
        raw_->context->ops.poll_cq(raw_, static_cast<int>(completions.size()), completions.data());
    if (count < 0) {
        throw verbs_error("ibv_poll_cq", count == -1 ? EIO : count);
    }
    return count;
}

void CompletionQueue::arm() {
    if (const int error = raw_->context->ops.req_notify_cq(raw_, 0); error != 0) {
        throw verbs_error("ibv_req_notify_cq", error);
    }
}

}  // namespace weightsync::verbs
