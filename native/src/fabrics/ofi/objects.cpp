#include "objects.hpp"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <set>
#include <string_view>
#include <thread>

#include <weightsync/os.hpp>

namespace weightsync::ofi {

using namespace abi;  // NOLINT: names of libfabric

void close_fid(fid& object, const char* what) noexcept {
    const SignalGuard guard;
    if (const int result = object.ops->close(&object); result != 0) {
        report(std::string("closing a libfabric ") + what +
               " failed: " + library().strerror(-result));
    }
}

namespace {

void check(Scope scope, std::string_view call, long result, std::string_view advice = "") {
    if (result < 0) {
        throw call_error(scope, call, result, advice);
    }
}

// Names of the open endpoints of this process.
struct OpenNames {
    std::mutex mutex;
    std::set<std::string> names;
};
std::string text_of(std::span<const std::byte> name) {
    return {reinterpret_cast<const char*>(name.data()), name.size()};
}
OpenNames& open_names() {
    static OpenNames names;
    return names;
}

// The shm provider uses the very mapping of an endpoint that it finds by name in its own process,
// also after that was closed. Another spelling of the same file gets a mapping of its own.
std::string respell(std::span<const std::byte> name) {
    constexpr std::string_view kPrefix = "fi_shm://";
    std::string spelled = text_of(name);
    if (spelled.starts_with(kPrefix)) {
        spelled.insert(kPrefix.size(), "/");
    }
    return spelled;
}

std::string address_text(const fi_info& info) {
    if (info.src_addr == nullptr) {
        return {};
    }
    std::array<char, INET6_ADDRSTRLEN> text{};
    const auto* generic = static_cast<const sockaddr*>(info.src_addr);
    if (info.src_addrlen >= sizeof(sockaddr_in) && generic->sa_family == AF_INET) {
        const auto* ipv4 = static_cast<const sockaddr_in*>(info.src_addr);
        ::inet_ntop(AF_INET, &ipv4->sin_addr, text.data(), text.size());
    } else if (info.src_addrlen >= sizeof(sockaddr_in6) && generic->sa_family == AF_INET6) {
        const auto* ipv6 = static_cast<const sockaddr_in6*>(info.src_addr);
        ::inet_ntop(AF_INET6, &ipv6->sin6_addr, text.data(), text.size());
    }
    return text.data();
}

}  // namespace

Domain::Domain(Info info) : info_(std::move(info)), provider_(info_->fabric_attr->prov_name) {
    const std::string address = address_text(*info_);
    label_ = provider_ + " " + (address.empty() ? name() : address);
    const SignalGuard guard;
    fid_fabric* fabric = nullptr;
    check(Scope::kRail, "fi_fabric(" + label_ + ")",
          library().fabric(info_->fabric_attr, &fabric, nullptr), "see `fi_info`");
    fabric_ = Fid(fabric, "fabric");
    fid_domain* domain = nullptr;
    check(Scope::kRail, "fi_domain(" + label_ + ")",
          fabric_->ops->domain(fabric_.get(), info_.get(), &domain, nullptr),
          "is the device up, and may this user open it?");
    domain_ = Fid(domain, "domain");
}

std::string Domain::name() const {
    return info_->domain_attr->name == nullptr ? "" : info_->domain_attr->name;
}

Region::Region(std::shared_ptr<Domain> domain, std::uint64_t address, std::uint64_t nbytes,
               std::uint64_t access)
    : domain_(std::move(domain)) {
    // A fresh key for every registration: a writer of an older one finds nothing. Providers that
    // choose keys themselves ignore it.
    const std::size_t key_bytes = domain_->info()->domain_attr->mr_key_size;
    const std::uint64_t mask =
        key_bytes >= sizeof(std::uint64_t) ? ~std::uint64_t{0} : (1ULL << (8 * key_bytes)) - 1;
    constexpr int kTries = 8;  // for narrow keys
    for (int attempt = 1;; ++attempt) {
        fid_mr* region = nullptr;
        const int result =
            domain_->get()->mr->reg(&domain_->get()->base, reinterpret_cast<const void*>(address),
                                    nbytes, access, 0, random_u64() & mask, 0, &region, nullptr);
        if (result == 0) {
            region_ = Fid(region, "memory region");
            return;
        }
        if (result != -ENOKEY && result != -EEXIST) {
            throw call_error(
                Scope::kMemory,
                "fi_mr_reg(" + domain_->label() + ", " + std::to_string(nbytes) + " bytes)", result,
                "check `ulimit -l`");
        }
        if (attempt == kTries) {
            throw call_error(Scope::kMemory, "fi_mr_reg(" + domain_->label() + ")", result,
                             "too many regions are registered");
        }
    }
}

void Region::bind(const Endpoint& endpoint) const {
    fid& self = region_->base;
    check(Scope::kMemory, "fi_mr_bind", self.ops->bind(&self, &endpoint.get()->base, 0));
    check(Scope::kMemory, "fi_mr_enable", self.ops->control(&self, FI_ENABLE, nullptr));
}

Endpoint::Endpoint(std::shared_ptr<Domain> domain, std::size_t num_entries)
    : domain_(std::move(domain)) {
    const SignalGuard guard;
    fid_domain* const owner = domain_->get();
    const std::string& label = domain_->label();

    fi_av_attr av_attr{};
    av_attr.type = domain_->info()->domain_attr->av_type;
    fid_av* addresses = nullptr;
    check(Scope::kRail, "fi_av_open(" + label + ")",
          owner->ops->av_open(owner, &av_attr, &addresses, nullptr));
    addresses_ = Fid(addresses, "address vector");
    queue_ = open_queue(num_entries);

    fid_ep* endpoint = nullptr;
    check(Scope::kRail, "fi_endpoint(" + label + ")",
          owner->ops->endpoint(owner, domain_->info(), &endpoint, nullptr),
          "the device may have no queue pairs left");
    endpoint_ = Fid(endpoint, "endpoint");
    set_options();
    fid& self = endpoint_->base;
    check(Scope::kRail, "fi_ep_bind(av)", self.ops->bind(&self, &addresses_->base, 0));
    check(Scope::kRail, "fi_ep_bind(cq)",
          self.ops->bind(&self, &queue_->base, FI_TRANSMIT | FI_RECV));
    check(Scope::kRail, "fi_enable(" + label + ")", self.ops->control(&self, FI_ENABLE, nullptr),
          "for verbs;ofi_rxm on small devices set FI_UNIVERSE_SIZE=8");

    std::size_t nbytes = 0;
    [[maybe_unused]] const int too_small = endpoint_->cm->getname(&self, nullptr, &nbytes);
    name_.resize(nbytes);
    check(Scope::kRail, "fi_getname(" + label + ")",
          endpoint_->cm->getname(&self, name_.data(), &nbytes));
    name_.resize(nbytes);
    OpenNames& open = open_names();
    const std::lock_guard lock(open.mutex);
    open.names.insert(text_of(name_));
}

std::unique_lock<std::mutex> Endpoint::lock_within(std::chrono::milliseconds patience) {
    constexpr std::chrono::microseconds kNap{100};
    const auto until = std::chrono::steady_clock::now() + patience;
    std::unique_lock lock(mutex_, std::try_to_lock);
    while (!lock && std::chrono::steady_clock::now() < until) {
        std::this_thread::sleep_for(kNap);
        [[maybe_unused]] const bool is_locked = lock.try_lock();
    }
    return lock;
}

bool Endpoint::is_open_here(std::span<const std::byte> name) {
    OpenNames& open = open_names();
    const std::lock_guard lock(open.mutex);
    return open.names.contains(text_of(name));
}

Fid<fid_cq> Endpoint::open_queue(std::size_t num_entries) {
    fid_domain* const owner = domain_->get();
    fi_cq_attr attr{};
    attr.size = num_entries;
    attr.format = FI_CQ_FORMAT_DATA;
    fid_cq* queue = nullptr;
    // Not every provider has a descriptor to wait for, and that of `net` stays readable.
    for (const fi_wait_obj wait_obj : {FI_WAIT_FD, FI_WAIT_NONE}) {
        if (wait_obj == FI_WAIT_FD && domain_->provider() == "net") {
            continue;
        }
        attr.wait_obj = wait_obj;
        const int result = owner->ops->cq_open(owner, &attr, &queue, nullptr);
        if (result == 0) {
            break;
        }
        if (wait_obj == FI_WAIT_NONE) {
            throw call_error(Scope::kRail, "fi_cq_open(" + domain_->label() + ")", result,
                             "for verbs;ofi_rxm on small devices set FI_UNIVERSE_SIZE=8");
        }
    }
    Fid owned(queue, "completion queue");
    if (attr.wait_obj == FI_WAIT_FD &&
        owned->base.ops->control(&owned->base, FI_GETWAIT, &wait_fd_) != 0) {
        wait_fd_ = -1;
    }
    return owned;
}

void Endpoint::set_options() const {
    if (domain_->provider().find("efa") == std::string::npos) {
        return;
    }
    // Between processes of one host the provider would write by cross-memory attach, which no
    // closed region stops; and our thread must not run kernels of a framework's GPU.
    const bool is_permitted = false;
    for (const int option : {FI_OPT_SHARED_MEMORY_PERMITTED, FI_OPT_CUDA_API_PERMITTED}) {
        const int result = endpoint_->ops->setopt(&endpoint_->base, FI_OPT_ENDPOINT, option,
                                                  &is_permitted, sizeof(is_permitted));
        const bool is_unknown = result == -ENOPROTOOPT || result == -EOPNOTSUPP ||
                                result == -ENOSYS || result == -EINVAL;
        if (result != 0 && !(is_unknown && option == FI_OPT_CUDA_API_PERMITTED)) {
            throw call_error(Scope::kRail, "fi_setopt(efa, shared memory off)", result,
                             "a newer libfabric is needed, or FI_EFA_ENABLE_SHM_TRANSFER=0");
        }
    }
}

fi_addr_t Endpoint::insert(std::span<const std::byte> name) const {
    fi_addr_t address = 0;
    const std::string spelled = respell(name);
    const int result =
        addresses_->ops->insert(addresses_.get(), spelled.data(), 1, &address, 0, nullptr);
    if (result != 1) {
        throw call_error(Scope::kPeer, "fi_av_insert(" + domain_->label() + ")",
                         result < 0 ? result : -EINVAL, "can the peer be reached on this rail?");
    }
    return address;
}

ssize_t Endpoint::poll(std::span<fi_cq_data_entry> entries) const noexcept {
    const ssize_t count = queue_->ops->read(queue_.get(), entries.data(), entries.size());
    return count == -EAGAIN || count == -EINTR ? 0 : count;
}

std::optional<CompletionError> Endpoint::next_error() const {
    fi_cq_err_entry entry{};
    if (queue_->ops->readerr(queue_.get(), &entry, 0) <= 0) {
        return std::nullopt;
    }
    std::array<char, 128> buffer{};
    const char* detail = queue_->ops->strerror(queue_.get(), entry.prov_errno, entry.err_data,
                                               buffer.data(), buffer.size());
    CompletionError found{entry.op_context, entry.err, library().strerror(entry.err)};
    if (detail != nullptr && *detail != '\0' && found.text != detail) {
        found.text += std::string(", ") + detail;
    }
    return found;
}

bool Endpoint::may_sleep() const noexcept {
    fid* waited = &queue_->base;
    fid_fabric* const owner = domain_->fabric();
    return owner->ops->trywait(owner, &waited, 1) == 0;
}

void Endpoint::stop() noexcept {
    if (endpoint_) {
        endpoint_.reset();
        OpenNames& open = open_names();
        const std::lock_guard lock(open.mutex);
        open.names.erase(text_of(name_));
    }
}

void Endpoint::close() noexcept {
    stop();
    queue_.reset();
    addresses_.reset();
    wait_fd_ = -1;
}

}  // namespace weightsync::ofi
