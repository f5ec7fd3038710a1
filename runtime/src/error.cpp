#include "error.h"

#include <cstdio>
#include <cstring>

namespace llava_edge {

static std::string format_list(const char * pattern, va_list list) {
    va_list again;
    va_copy(again, list);
    const int length = std::vsnprintf(nullptr, 0, pattern, list);
    std::string text(length > 0 ? static_cast<size_t>(length) : 0, '\0');
    std::vsnprintf(text.data(), text.size() + 1, pattern, again);
    va_end(again);
    return text;
}

std::string format(const char * pattern, ...) {
    va_list list;
    va_start(list, pattern);
    std::string text = format_list(pattern, list);
    va_end(list);
    return text;
}

std::string shown(const std::string & text) {
    std::string out = "'";
    for (const char c : text.substr(0, 60)) {
        out += c >= ' ' && c <= '~' ? c : '?';
    }
    return out + (text.size() > 60 ? "...'" : "'");
}

// strerror_r gives a number or a text, by the C library.
[[maybe_unused]] static const char * text_of(int status, const char * buffer) {
    return status == 0 ? buffer : "unknown error";
}

[[maybe_unused]] static const char * text_of(const char * text, const char *) {
    return text;
}

std::string system_text(int error) {
    char buffer[256] = {};
    return text_of(strerror_r(error, buffer, sizeof buffer), buffer);
}

void fail(llava_edge_status status, const char * pattern, ...) {
    va_list list;
    va_start(list, pattern);
    std::string text = format_list(pattern, list);
    va_end(list);
    throw Error(status, text);
}

}  // namespace llava_edge
