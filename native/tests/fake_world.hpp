// What the fake NICs of fake_verbs.hpp consist of.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "fake_verbs.hpp"

namespace weightsync::test {

struct FakeDevice;

struct FakeContext {
    verbs::ibv_context raw{};  // first: the library's pointer is ours
    FakeDevice* device = nullptr;
    std::deque<verbs::ibv_async_event> events;
};

struct FakeChannel {
    verbs::ibv_comp_channel raw{};
    std::deque<verbs::ibv_cq*> events;
};

struct FakeCq {
    verbs::ibv_cq raw{};
    std::deque<verbs::ibv_wc> entries;
    bool is_armed = false;
};

struct Pending {
    verbs::ibv_send_wr request;
    verbs::ibv_sge part;
};

struct FakeQp {
    verbs::ibv_qp raw{};
    FakeDevice* device = nullptr;
    verbs::ibv_qp_state state = verbs::IBV_QPS_RESET;
    verbs::ibv_qp_cap cap{};
    std::uint32_t peer = 0;
    std::deque<std::uint64_t> receives;  // wr_id
    std::deque<Pending> held;
    std::uint32_t used = 0;  // of the send queue
    std::uint32_t unsignalled = 0;
    std::map<std::uint64_t, std::uint32_t> frees;  // wr_id of a completion: places it frees
};

struct FakeMr {
    verbs::ibv_mr raw{};
    int access = 0;
};

struct FakeDevice {
    std::string name;
    bool is_up = true;
    bool is_holding = false;
    std::optional<verbs::ibv_wc_status> failure;
    int skip = 0;
    bool has_landed = false;
    int refusals = 0;
    int refusal = 0;
    int refusal_taken = 0;
    std::optional<verbs::ibv_wc_status> arrival_failure;
    int arrival_skip = 0;
    std::optional<verbs::ibv_wc_status> message_failure;
    int message_refusal = 0;
    int receive_refusal = 0;
    bool polls_fail = false;
    std::vector<FakeContext*> contexts;
};

struct World {
    std::recursive_mutex mutex;
    FakeLimits limits;
    std::vector<std::unique_ptr<FakeDevice>> devices;
    std::map<std::uint32_t, FakeQp*> qps;
    std::map<std::uint32_t, FakeMr*> mrs;  // by key
    std::uint32_t next_number = 17;
    std::string sysfs;
    FakeCounts counts;
    int destroy_qp_failures = 0;
    int create_qp_failures = 0;
    int reg_mr_failures = 0;
    int reg_mr_error = 0;
    verbs::ibv_qp_state modify_state = verbs::IBV_QPS_RESET;
    int modify_failures = 0;
    std::uint64_t gpu_begin = 0;
    std::uint64_t gpu_end = 0;
    bool has_peermem = false;
    int dmabuf_error = 0;
    verbs::Table table;
};

extern World* world;
using Lock = std::lock_guard<std::recursive_mutex>;

[[nodiscard]] FakeDevice& device_of(int number);
void ring(int fd);

}  // namespace weightsync::test
