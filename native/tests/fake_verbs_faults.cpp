// How tests have the fake NICs fail.
#include "fake_world.hpp"

namespace weightsync::test {

using namespace weightsync::verbs;

void FakeVerbs::fail_write(int device, ibv_wc_status status, int skip, bool has_landed) {
    const Lock lock(world->mutex);
    FakeDevice& one = device_of(device);
    one.failure = status;
    one.skip = skip;
    one.has_landed = has_landed;
}

void FakeVerbs::refuse_posts(int device, int error, int times, int taken) {
    const Lock lock(world->mutex);
    FakeDevice& one = device_of(device);
    one.refusal = error;
    one.refusals = times;
    one.refusal_taken = taken;
}

void FakeVerbs::fail_arrival(int device, ibv_wc_status status, int skip) {
    const Lock lock(world->mutex);
    device_of(device).arrival_failure = status;
    device_of(device).arrival_skip = skip;
}

void FakeVerbs::fail_message(int device, ibv_wc_status status) {
    const Lock lock(world->mutex);
    device_of(device).message_failure = status;
}

void FakeVerbs::refuse_messages(int device, int error) {
    const Lock lock(world->mutex);
    device_of(device).message_refusal = error;
}

void FakeVerbs::refuse_receives(int device, int error) {
    const Lock lock(world->mutex);
    device_of(device).receive_refusal = error;
}

void FakeVerbs::fail_polls(int device, bool on) {
    const Lock lock(world->mutex);
    device_of(device).polls_fail = on;
}

void FakeVerbs::set_port(int device, bool is_up) {
    const Lock lock(world->mutex);
    device_of(device).is_up = is_up;
    raise(device, is_up ? IBV_EVENT_PORT_ACTIVE : IBV_EVENT_PORT_ERR);
}

void FakeVerbs::raise(int device, ibv_event_type type) {
    const Lock lock(world->mutex);
    for (FakeContext* context : device_of(device).contexts) {
        ibv_async_event event{};
        event.event_type = type;
        event.element.port_num = 1;
        context->events.push_back(event);
        ring(context->raw.async_fd);
    }
}

void FakeVerbs::fail_destroy_qp(int times) {
    const Lock lock(world->mutex);
    world->destroy_qp_failures = times;
}

void FakeVerbs::fail_modify_qp(ibv_qp_state state, int times) {
    const Lock lock(world->mutex);
    world->modify_state = state;
    world->modify_failures = times;
}

void FakeVerbs::set_gpu_memory(std::uint64_t address, std::uint64_t nbytes, bool has_peermem,
                               int dmabuf_error) {
    const Lock lock(world->mutex);
    world->gpu_begin = address;
    world->gpu_end = address + nbytes;
    world->has_peermem = has_peermem;
    world->dmabuf_error = dmabuf_error;
}

void FakeVerbs::fail_create_qp(int times) {
    const Lock lock(world->mutex);
    world->create_qp_failures = times;
}

void FakeVerbs::fail_reg_mr(int times, int error) {
    const Lock lock(world->mutex);
    world->reg_mr_failures = times;
    world->reg_mr_error = error;
}

}  // namespace weightsync::test
