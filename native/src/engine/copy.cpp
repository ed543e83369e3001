#include <weightsync/copy.hpp>

#include <pthread.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <weightsync/error.hpp>
#include <weightsync/live.hpp>

namespace weightsync {

namespace {

#if defined(__x86_64__)

__attribute__((target("avx2"))) void copy_streaming(std::byte* destination, const std::byte* source,
                                                    std::uint64_t nbytes) noexcept {
    constexpr std::uint64_t kStep = 128;
    const auto head = (0 - reinterpret_cast<std::uintptr_t>(destination)) & 31U;
    std::memcpy(destination, source, head);
    std::uint64_t at = head;
    for (; at + kStep <= nbytes; at += kStep) {
        const auto* from = reinterpret_cast<const __m256i*>(source + at);
        auto* to = reinterpret_cast<__m256i*>(destination + at);
        const __m256i a = _mm256_loadu_si256(from);
        const __m256i b = _mm256_loadu_si256(from + 1);
        const __m256i c = _mm256_loadu_si256(from + 2);
        const __m256i d = _mm256_loadu_si256(from + 3);
        _mm256_stream_si256(to, a);
        _mm256_stream_si256(to + 1, b);
        _mm256_stream_si256(to + 2, c);
        _mm256_stream_si256(to + 3, d);
    }
    std::memcpy(destination + at, source + at, nbytes - at);
    _mm_sfence();
}

#endif

}  // namespace

void copy_bytes(std::byte* destination, const std::byte* source, std::uint64_t nbytes) noexcept {
#if defined(__x86_64__)
    static const bool has_avx2 = __builtin_cpu_supports("avx2") != 0;
    if (nbytes >= kStreamBytes && has_avx2) {
        copy_streaming(destination, source, nbytes);
        return;
    }
#endif
    if (nbytes != 0) {  // a write of nothing may come with no address at all
        std::memcpy(destination, source, nbytes);
    }
}

void store_fence() noexcept {
#if defined(__x86_64__)
    _mm_sfence();
#elif defined(__aarch64__)
    asm volatile("dmb ishst" ::: "memory");
#endif
}

void Job::work() noexcept {
    for (;;) {
        const std::size_t unit = next_.fetch_add(1, std::memory_order_relaxed);
        if (unit >= num_units_) {
            return;
        }
        run(unit);
        // acq_rel: whoever finishes sees what all the others did
        if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            finish();
        }
    }
}

void CopyPool::submit(std::shared_ptr<Job> job) {
    if (job->num_units() == 0) {
        job->finish();
        return;
    }
    const bool one_suffices = job->num_units() == 1;
    {
        const std::lock_guard lock(mutex_);
        if (stopping_) {
            throw Error(Scope::kTransfer, "the engine is closed");
        }
        while (threads_.size() < static_cast<std::size_t>(num_threads_)) {
            threads_.push_back(start_thread(
                "ws-copy", [](void* pool) { static_cast<CopyPool*>(pool)->loop(); }, this));
        }
        queue_.push_back(std::move(job));
    }
    if (one_suffices) {
        changed_.notify_one();
    } else {
        changed_.notify_all();
    }
}

void CopyPool::stop() noexcept {
    std::vector<std::thread> threads;
    {
        const std::lock_guard lock(mutex_);
        stopping_ = true;
        threads.swap(threads_);
    }
    changed_.notify_all();
    for (std::thread& thread : threads) {
        thread.join();
    }
}

void CopyPool::loop() {
    std::unique_lock lock(mutex_);
    for (;;) {
        changed_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
        if (queue_.empty()) {
            return;
        }
        std::shared_ptr<Job> job = queue_.front();
        lock.unlock();
        job->work();
        lock.lock();
        // All units are claimed: the first worker to come back takes the job from the queue.
        if (!queue_.empty() && queue_.front() == job) {
            queue_.pop_front();
        }
        lock.unlock();
        job.reset();  // outside the lock: it may be the last owner
        lock.lock();
    }
}

std::thread start_thread(const char* name, void (*body)(void*), void* argument) {
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        std::thread thread([body, argument] {
            count_live(Kind::kThread, 1);
            body(argument);
            count_live(Kind::kThread, -1);
        });
        pthread_setname_np(thread.native_handle(), name);
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return thread;
    } catch (const std::system_error& error) {
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        throw os_error(Scope::kMemory, "pthread_create", error.code().value(),
                       "check `ulimit -u` and the cgroup's pids limit");
    }
}

void abandon(std::thread thread) noexcept {
    const sched_param none{};
    pthread_setschedparam(thread.native_handle(), SCHED_IDLE, &none);
    thread.detach();
}

CopyUnits cut_units(std::span<const Write> rows, std::uint64_t unit_bytes, std::uint32_t max_rows) {
    CopyUnits result;
    const auto num_rows = static_cast<std::uint32_t>(rows.size());
    std::uint32_t begin = 0;
    std::uint64_t bytes = 0;
    const auto close_group = [&](std::uint32_t end) {
        if (end > begin) {
            result.units.push_back({begin, end, 0, 0});
        }
        bytes = 0;
    };
    for (std::uint32_t row = 0; row < num_rows; ++row) {
        const std::uint64_t nbytes = rows[row].nbytes;
        if (nbytes < 2 * unit_bytes) {
            bytes += nbytes;
            if (bytes >= unit_bytes || row + 1 - begin >= max_rows) {
                close_group(row + 1);
                begin = row + 1;
            }
            continue;
        }
        close_group(row);
        begin = row + 1;
        const std::uint64_t pieces = (nbytes + unit_bytes - 1) / unit_bytes;
        if (!result.pieces_left) {
            result.pieces_left = std::make_unique<std::atomic<std::uint32_t>[]>(rows.size());
        }
        result.pieces_left[row].store(static_cast<std::uint32_t>(pieces));
        for (std::uint64_t at = 0; at < nbytes; at += unit_bytes) {
            result.units.push_back({row, row + 1, at, std::min(unit_bytes, nbytes - at)});
        }
    }
    close_group(num_rows);
    return result;
}

}  // namespace weightsync
