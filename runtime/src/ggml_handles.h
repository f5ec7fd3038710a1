// ggml's objects, freed by themselves.
#pragma once

#include <memory>

#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml.h>

namespace llava_edge {

template <auto free> struct Freed {
    template <typename T> void operator()(T * object) const { free(object); }
};

using Context = std::unique_ptr<ggml_context, Freed<ggml_free>>;
using Backend = std::unique_ptr<ggml_backend, Freed<ggml_backend_free>>;
using Buffer  = std::unique_ptr<ggml_backend_buffer, Freed<ggml_backend_buffer_free>>;
using Sched   = std::unique_ptr<ggml_backend_sched, Freed<ggml_backend_sched_free>>;

}  // namespace llava_edge
