// Whether the evaluation that runs now has been asked to end.
#pragma once

#include <atomic>

namespace llava_edge {

struct StopFlag {
    std::atomic<const std::atomic<bool> *> session{ nullptr };  // the flag of the session that is answering

    bool wanted() const {
        const std::atomic<bool> * flag = session.load();
        return flag != nullptr && flag->load();
    }
};

}  // namespace llava_edge
