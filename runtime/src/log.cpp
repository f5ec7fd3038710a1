// Where lines of this library and of llama.cpp go.

#include <mutex>

#include "engine.h"

namespace llava_edge {

namespace {

std::mutex              mutex;
llava_edge_log_callback current   = nullptr;
void *                  user_data = nullptr;

void on_llama_log(ggml_log_level level, const char * text, void *) {
    if (level < GGML_LOG_LEVEL_DEBUG || level > GGML_LOG_LEVEL_ERROR) {
        return;  // goes on with a line that was begun
    }
    std::string line = text;
    while (!line.empty() && (line.back() == '\n' || line.back() == '\r')) {
        line.pop_back();
    }
    if (line.find_first_not_of(" .") != std::string::npos) {
        log_line(static_cast<llava_edge_log_level>(level), line);
    }
}

}  // namespace

static_assert(int(GGML_LOG_LEVEL_DEBUG) == LLAVA_EDGE_LOG_DEBUG && int(GGML_LOG_LEVEL_INFO) == LLAVA_EDGE_LOG_INFO &&
                  int(GGML_LOG_LEVEL_WARN) == LLAVA_EDGE_LOG_WARNING && int(GGML_LOG_LEVEL_ERROR) == LLAVA_EDGE_LOG_ERROR,
              "the levels have llama.cpp's numbers");

void start_llama() {
    static std::once_flag once;
    std::call_once(once, [] {
        llama_log_set(on_llama_log, nullptr);
        llama_backend_init();
    });
}

void set_log(llava_edge_log_callback callback, void * data) {
    const std::lock_guard<std::mutex> lock(mutex);
    current   = callback;
    user_data = data;
}

void log_line(llava_edge_log_level level, const std::string & line) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (current != nullptr) {
        current(level, line.c_str(), user_data);
    }
}

}  // namespace llava_edge
