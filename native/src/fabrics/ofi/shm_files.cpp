#include "shm_files.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

namespace weightsync::ofi {

namespace {

constexpr const char* kFolder = "/dev/shm";
constexpr const char* kPrefix = "weightsync-ofi-";

// Pids mean nothing in another namespace.
unsigned long pid_namespace() {
    struct stat status{};
    return ::stat("/proc/self/ns/pid", &status) == 0 ? status.st_ino : 0;
}

}  // namespace

std::string make_shm_name() {
    static std::atomic<unsigned> count{0};
    return "fi_shm://" + std::string(kPrefix) + std::to_string(pid_namespace()) + "-" +
           std::to_string(::getpid()) + "-" + std::to_string(count.fetch_add(1));
}

void sweep_shm_files() noexcept {
    const std::unique_ptr<DIR, int (*)(DIR*)> folder(::opendir(kFolder), ::closedir);
    if (!folder) {
        return;
    }
    const unsigned long own = pid_namespace();
    while (const dirent* entry = ::readdir(folder.get())) {
        unsigned long space = 0;
        int pid = 0;
        unsigned number = 0;
        if (std::sscanf(entry->d_name, "weightsync-ofi-%lu-%d-%u", &space, &pid, &number) == 3 &&
            space == own && pid > 0 && ::kill(pid, 0) != 0 && errno == ESRCH) {
            // Of another user it stays: unlinking fails.
            ::unlinkat(::dirfd(folder.get()), entry->d_name, 0);
        }
    }
}

}  // namespace weightsync::ofi
