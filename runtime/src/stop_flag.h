// Whether the evaluation that runs now has been asked to end.
#pragma once

#include <atomic>
#include <cstdint>

namespace llava_edge {

struct StopFlag {
    std::atomic<const std::atomic<uint64_t> *> stopped{ nullptr };  // the answering session's last stopped call
    std::atomic<uint64_t>                      call{ 0 };           // the number of the call that answers

    bool wanted() const {
        const std::atomic<uint64_t> * last = stopped.load();
        return last != nullptr && last->load() >= call.load();
    }
};

}  // namespace llava_edge
