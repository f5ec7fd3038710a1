#include "threads.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace llava_edge {

#if defined(__linux__)

// Whole CPUs that the container's limit allows.
static int cpu_quota() {
    std::ifstream file("/sys/fs/cgroup/cpu.max");
    std::string   quota;
    double        period = 0;
    if (!(file >> quota >> period) || quota == "max" || period <= 0) {
        return 1 << 16;
    }
    return std::max(1, static_cast<int>(std::nearbyint(std::stod(quota) / period)));
}

int default_threads() {
    cpu_set_t usable;
    if (sched_getaffinity(0, sizeof usable, &usable) != 0) {
        return std::max(1u, std::thread::hardware_concurrency());
    }
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &usable)) {
            continue;
        }
        std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
        std::string   siblings;
        cores.insert(file >> siblings ? siblings : std::to_string(cpu));
    }
    return std::max(1, std::min(static_cast<int>(cores.size()), cpu_quota()));
}

#elif defined(__APPLE__)

int default_threads() {
    for (const char * key : { "hw.perflevel0.physicalcpu", "hw.physicalcpu" }) {
        int    count = 0;
        size_t size  = sizeof count;
        if (sysctlbyname(key, &count, &size, nullptr, 0) == 0 && count > 0) {
            return count;
        }
    }
    return std::max(1u, std::thread::hardware_concurrency());
}

#else

int default_threads() {
    return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

#endif

int max_threads() {
    return static_cast<int>(std::clamp(4 * std::thread::hardware_concurrency(), 64u, 1024u));
}

}  // namespace llava_edge
