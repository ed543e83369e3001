// What it costs to submit a write, from C++: time inside post() and its relatives. Printed as JSON
// lines for scripts/bench/submit.py.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <numeric>

#include <weightsync/fabrics.hpp>
#include <weightsync/scatter.hpp>
#include <weightsync/sim.hpp>

namespace weightsync {
namespace {

constexpr std::size_t kWriteBytes = 64;
constexpr std::size_t kWritesPerCase = 100'000;
constexpr double kWait_s = 60;

struct Rig {
    std::shared_ptr<Engine> source;
    std::shared_ptr<Engine> sink;
    std::vector<std::byte> payload;
    std::shared_ptr<Lease> lease;
    std::vector<std::byte> private_bytes;
    std::shared_ptr<Lease> private_lease;
    std::shared_ptr<Memory> memory;
    std::shared_ptr<Target> target;
    std::shared_ptr<Remote> remote;

    Rig(std::shared_ptr<Engine> from, std::shared_ptr<Engine> to, std::size_t batch,
        bool is_private)
        : source(std::move(from)), sink(std::move(to)), payload(batch * kWriteBytes) {
        lease = source->add_lease(reinterpret_cast<std::uint64_t>(payload.data()), payload.size(),
                                  nullptr);
        RangeRequest range;
        range.nbytes = payload.size();
        if (is_private) {
            private_bytes.resize(payload.size());
            private_lease = sink->add_lease(reinterpret_cast<std::uint64_t>(private_bytes.data()),
                                            private_bytes.size(), nullptr);
            range.lease = private_lease->state();
        } else {
            memory = sink->allocate(payload.size(), true);
            range.lease = memory->lease();
            range.block = memory->block();
        }
        const std::vector<std::int32_t> slots{static_cast<std::int32_t>(batch)};
        target = sink->export_target({range}, slots, 12, 1);
        remote = source->connect(target->descriptor(), Deadline::after(kWait_s));
    }
};

// Nanoseconds per write inside `submit`, the median over batches; waits are not counted.
double measure(std::size_t batch, const std::function<std::shared_ptr<Operation>()>& submit) {
    std::vector<double> times;
    for (std::size_t done = 0; done < kWritesPerCase; done += batch) {
        const auto begin = std::chrono::steady_clock::now();
        const auto operation = submit();
        const auto end = std::chrono::steady_clock::now();
        operation->wait(Deadline::after(kWait_s));
        times.push_back(std::chrono::duration<double, std::nano>(end - begin).count() /
                        static_cast<double>(batch));
    }
    const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
    std::ranges::nth_element(times, middle);
    return *middle;
}

void print(const char* fabric, const char* call, std::size_t batch, double nanoseconds) {
    std::printf("{\"fabric\": \"%s\", \"call\": \"%s\", \"batch\": %zu, \"ns_per_write\": %.1f}\n",
                fabric, call, batch, nanoseconds);
}

void run(const char* fabric, const std::shared_ptr<Engine>& source,
         const std::shared_ptr<Engine>& sink, bool is_private) {
    for (const std::size_t batch : {1U, 16U, 256U, 4096U}) {
        const Rig rig(source, sink, batch, is_private);
        const auto base = reinterpret_cast<std::uint64_t>(rig.payload.data());
        std::vector<Write> rows(batch);
        for (std::size_t i = 0; i < batch; ++i) {
            rows[i] = {base + i * kWriteBytes, i * kWriteBytes, kWriteBytes,
                       static_cast<std::int64_t>(i)};
        }
        print(fabric, "post", batch, measure(batch, [&] { return rig.remote->post(rows); }));
        std::vector<std::int64_t> indices(batch);
        std::iota(indices.begin(), indices.end(), 0);
        PagedWrite pages;
        pages.page_bytes = kWriteBytes;
        pages.source = {indices, kWriteBytes, base};
        pages.destination = {indices, kWriteBytes, 0};
        pages.first_immediate = 0;
        print(fabric, "write_paged", batch,
              measure(batch, [&] { return rig.remote->write_paged(pages); }));
    }
}

}  // namespace
}  // namespace weightsync

int main() {
    using namespace weightsync;
    const auto open = [](const char* name) {
        return Engine::open(name, [](EngineContext& context) {
            return make_local_fabric(context, {.num_threads = 1});
        });
    };
    run("local-push", open("source"), open("sink"), false);
    run("local-pull", open("source"), open("sink"), true);
    const auto wire = SimWire::make(1, false);
    const auto attach = [wire](const char* name) {
        return Engine::open(name, [wire](EngineContext& context) { return wire->attach(context); });
    };
    run("sim", attach("source"), attach("sink"), true);
    return 0;
}
