// Failures inside the library: one exception type, which api.cpp turns into a status and a message.
#pragma once

#include <cstdarg>
#include <stdexcept>
#include <string>

#include "llava_edge.h"

namespace llava_edge {

class Error : public std::runtime_error {
  public:
    Error(llava_edge_status code, const std::string & message) : std::runtime_error(message), status(code) {}

    const llava_edge_status status;
};

#if defined(__GNUC__)
#define LLAVA_EDGE_PRINTF(pattern, first) __attribute__((format(printf, pattern, first)))
#else
#define LLAVA_EDGE_PRINTF(pattern, first)
#endif

// A text as printf makes it.
std::string format(const char * pattern, ...) LLAVA_EDGE_PRINTF(1, 2);

// A text from a file, fit for a message: at most 60 bytes, nothing that is not printable ASCII.
std::string shown(const std::string & text);

// What an errno means. Unlike strerror, any thread may ask.
std::string system_text(int error);

[[noreturn]] void fail(llava_edge_status status, const char * pattern, ...) LLAVA_EDGE_PRINTF(2, 3);

}  // namespace llava_edge
