// The C functions: arguments checked, calls in turn, exceptions into statuses.

#include <cstring>
#include <functional>
#include <new>
#include <random>

#include "bundle.h"
#include "error.h"
#include "image.h"
#include "model.h"
#include "threads.h"
#include "tower.h"

using namespace llava_edge;

namespace {

// Why the last call on a handle failed. It is noted after the call's turn has ended, so it has a lock of its own.
struct Failure {
    mutable std::mutex mutex;
    std::string        text;

    const char * read() const {
        const std::lock_guard<std::mutex> lock(mutex);
        return text.c_str();
    }
};

}  // namespace

struct llava_edge_model {
    Model   model;
    Failure failure;
};

struct llava_edge_session {
    Session session;
    Failure failure;
};

struct llava_edge_tower {
    Tower tower;
};

namespace {

thread_local std::string last_error;

void note(const char * text, Failure * of_handle) noexcept {
    try {
        last_error = text;
        if (of_handle != nullptr) {
            const std::lock_guard<std::mutex> lock(of_handle->mutex);
            of_handle->text = text;
        }
    } catch (...) {  // no memory for the message; the status says it
    }
}

template <typename F> llava_edge_status guarded(Failure * of_handle, F && call) noexcept {
    try {
        call();
        return LLAVA_EDGE_OK;
    } catch (const Error & error) {
        note(error.what(), of_handle);
        return error.status;
    } catch (const std::bad_alloc &) {
        note("there is not enough memory", of_handle);
        return LLAVA_EDGE_OUT_OF_MEMORY;
    } catch (const std::length_error &) {
        note("there is not enough memory", of_handle);
        return LLAVA_EDGE_OUT_OF_MEMORY;
    } catch (const std::exception & error) {
        note(error.what(), of_handle);
        return LLAVA_EDGE_INTERNAL;
    } catch (...) {
        note("an unknown failure", of_handle);
        return LLAVA_EDGE_INTERNAL;
    }
}

void require(bool right, const char * problem) {
    if (!right) {
        fail(LLAVA_EDGE_INVALID_ARGUMENT, "%s", problem);
    }
}

// The model's turn for as long as this lives. A callback that calls in again would wait for itself.
class Turnstile {
  public:
    explicit Turnstile(Model & model) : model_(model) {
        if (model.owner.load() == std::this_thread::get_id()) {
            fail(LLAVA_EDGE_BUSY, "called from a callback of the same model");
        }
        model.mutex.lock();
        model.owner = std::this_thread::get_id();
    }
    ~Turnstile() {
        model_.owner = std::thread::id();
        model_.mutex.unlock();
    }
    Turnstile(const Turnstile &)             = delete;
    Turnstile & operator=(const Turnstile &) = delete;

  private:
    Model & model_;
};

template <typename F> llava_edge_status on_session(llava_edge_session * s, F && call) noexcept {
    return guarded(s != nullptr ? &s->failure : nullptr, [&] {
        require(s != nullptr, "session is NULL");
        const Turnstile turn(s->session.model);
        call(s->session);
    });
}

// The caller's struct over the defaults: as many bytes as the caller's header knew.
template <typename T> T taken(const T * given, void (*init)(T *), const char * name) {
    T params;
    init(&params);
    if (given != nullptr) {
        if (given->struct_size < sizeof(size_t) || given->struct_size > 4096) {
            fail(LLAVA_EDGE_INVALID_ARGUMENT, "%s.struct_size is %zu; call the init function first", name, given->struct_size);
        }
        std::memcpy(&params, given, std::min(given->struct_size, sizeof params));
    }
    return params;
}

template <typename T> void in_range(const char * name, T value, T low, T high) {
    if (!(value >= low && value <= high)) {
        fail(LLAVA_EDGE_INVALID_ARGUMENT, "%s is %g; expected %g to %g", name, double(value), double(low), double(high));
    }
}

GenerateParams checked(const llava_edge_generate_params & p) {
    in_range("max_tokens", p.max_tokens, 1, INT32_MAX);
    in_range("temperature", p.temperature, 0.0f, 100.0f);
    in_range("top_p", p.top_p, 0.0f, 1.0f);
    in_range("min_p", p.min_p, 0.0f, 1.0f);
    in_range("top_k", p.top_k, 0, INT32_MAX);
    in_range<int64_t>("seed", p.seed, -1, UINT32_MAX);
    in_range<size_t>("n_stop", p.n_stop, 0, 64);
    GenerateParams g;
    g.max_tokens           = p.max_tokens;
    g.sampling.temperature = static_cast<double>(p.temperature);
    g.sampling.top_p       = static_cast<double>(p.top_p);
    g.sampling.min_p       = static_cast<double>(p.min_p);
    g.sampling.top_k       = p.top_k;
    g.sampling.seed        = p.seed >= 0 ? static_cast<uint32_t>(p.seed) : p.temperature > 0 ? std::random_device{}() : 0;
    for (size_t i = 0; i < p.n_stop; i++) {
        require(p.stop != nullptr && p.stop[i] != nullptr && p.stop[i][0] != '\0', "stop holds NULL or an empty text");
        g.stop.emplace_back(p.stop[i]);
    }
    return g;
}

// As many bytes as the caller's header knew.
void hand_over(const Answer & answer, llava_edge_result * to) {
    llava_edge_result r;
    llava_edge_result_init(&r);
    r.text              = answer.text.c_str();
    r.token_ids         = answer.ids.data();
    r.completion_tokens = static_cast<int32_t>(answer.ids.size());
    r.prompt_tokens     = answer.prefill.tokens;
    r.cached_tokens     = answer.prefill.cached;
    r.image_tokens      = answer.prefill.image;
    r.finish_reason     = answer.finish;
    r.encode_seconds    = answer.encode_seconds;
    r.prefill_seconds   = answer.prefill_seconds;
    r.ttft_seconds      = answer.ttft_seconds;
    r.decode_seconds    = answer.decode_seconds;
    const size_t size   = std::min(to->struct_size, sizeof r);
    r.struct_size       = to->struct_size;
    std::memcpy(to, &r, size);
}

// While this lives, a stop of the session's call ends the model's evaluations.
struct Answering {
    StopFlag & flag;
    Answering(Session & session, uint64_t call) : flag(session.model.stop) {
        flag.call    = call;
        flag.stopped = &session.stopped;
    }
    ~Answering() { flag.stopped = nullptr; }
};

}  // namespace

int32_t llava_edge_version_number(void) {
    return LLAVA_EDGE_VERSION_NUMBER;
}

const char * llava_edge_version(void) {
    return LLAVA_EDGE_VERSION_STRING;
}

const char * llava_edge_status_string(llava_edge_status status) {
    switch (status) {
        case LLAVA_EDGE_OK:
            return "success";
        case LLAVA_EDGE_INVALID_ARGUMENT:
            return "invalid argument";
        case LLAVA_EDGE_BUSY:
            return "called from a callback of the same model";
        case LLAVA_EDGE_NOT_FOUND:
            return "no such file";
        case LLAVA_EDGE_IO:
            return "a file can't be read or written";
        case LLAVA_EDGE_MODEL_INVALID:
            return "the model is damaged";
        case LLAVA_EDGE_MODEL_UNSUPPORTED:
            return "the model is of an unsupported kind";
        case LLAVA_EDGE_SELF_CHECK_FAILED:
            return "the vision tower is wrong on this machine";
        case LLAVA_EDGE_IMAGE_INVALID:
            return "the picture is damaged";
        case LLAVA_EDGE_IMAGE_LIMIT:
            return "the picture is too large";
        case LLAVA_EDGE_IMAGE_UNSUPPORTED:
            return "the picture is of an unsupported format";
        case LLAVA_EDGE_CONTEXT_FULL:
            return "the context is full";
        case LLAVA_EDGE_STOPPED:
            return "stopped";
        case LLAVA_EDGE_STATE_INVALID:
            return "the saved session is damaged or of another model";
        case LLAVA_EDGE_OUT_OF_MEMORY:
            return "out of memory";
        case LLAVA_EDGE_ENGINE:
            return "llama.cpp can't evaluate a batch";
        case LLAVA_EDGE_INTERNAL:
            return "internal error";
    }
    return "unknown status";
}

const char * llava_edge_last_error(void) {
    return last_error.c_str();
}

void llava_edge_set_log(llava_edge_log_callback callback, void * user_data) {
    set_log(callback, user_data);
}

// Models

void llava_edge_model_params_init(llava_edge_model_params * params) {
    if (params != nullptr) {
        *params             = llava_edge_model_params{};
        params->struct_size = sizeof *params;
        params->n_gpu_layers = -1;
        params->self_check   = 1;
    }
}

llava_edge_status llava_edge_model_load(const char * directory, const llava_edge_model_params * params, llava_edge_model ** model) {
    if (model != nullptr) {
        *model = nullptr;
    }
    return guarded(nullptr, [&] {
        require(directory != nullptr, "directory is NULL");
        require(model != nullptr, "model is NULL");
        const auto p = taken(params, llava_edge_model_params_init, "params");
        in_range("n_ctx", p.n_ctx, 0, 1 << 27);
        in_range("n_threads", p.n_threads, 0, max_threads());
        in_range("n_gpu_layers", p.n_gpu_layers, -1, INT32_MAX);
        in_range("image_tokens", p.image_tokens, 0, INT32_MAX);
        start_llama();
        *model = new llava_edge_model{ { directory, p }, {} };
    });
}

void llava_edge_model_free(llava_edge_model * model) {
    delete model;
}

const char * llava_edge_model_last_error(const llava_edge_model * model) {
    return model != nullptr ? model->failure.read() : "";
}

const char * llava_edge_model_name(const llava_edge_model * model) {
    return model != nullptr ? model->model.bundle.name.c_str() : "";
}

int32_t llava_edge_model_n_ctx(const llava_edge_model * model) {
    return model != nullptr ? model->model.engine.n_ctx : 0;
}

int32_t llava_edge_model_n_threads(const llava_edge_model * model) {
    return model != nullptr ? model->model.engine.n_threads : 0;
}

int32_t llava_edge_model_image_tokens(const llava_edge_model * model) {
    return model != nullptr ? model->model.image_tokens : 0;
}

// Sessions

void llava_edge_generate_params_init(llava_edge_generate_params * params) {
    if (params != nullptr) {
        const GenerateParams defaults;
        *params             = llava_edge_generate_params{};
        params->struct_size = sizeof *params;
        params->max_tokens  = defaults.max_tokens;
        params->top_p       = static_cast<float>(defaults.sampling.top_p);
        params->min_p       = static_cast<float>(defaults.sampling.min_p);
        params->top_k       = defaults.sampling.top_k;
        params->seed        = -1;
    }
}

void llava_edge_result_init(llava_edge_result * result) {
    if (result != nullptr) {
        *result             = llava_edge_result{};
        result->struct_size = sizeof *result;
    }
}

llava_edge_status llava_edge_session_create(llava_edge_model * model, llava_edge_session ** session) {
    if (session != nullptr) {
        *session = nullptr;
    }
    return guarded(model != nullptr ? &model->failure : nullptr, [&] {
        require(model != nullptr, "model is NULL");
        require(session != nullptr, "session is NULL");
        const Turnstile turn(model->model);
        *session = new llava_edge_session{ Session(model->model), {} };
    });
}

void llava_edge_session_free(llava_edge_session * session) {
    delete session;
}

const char * llava_edge_session_last_error(const llava_edge_session * session) {
    return session != nullptr ? session->failure.read() : "";
}

static void add_bytes(Session & session, const std::string & bytes) {
    session.add_image(decode_image(bytes, session.model.bundle.image.pad_color));
}

llava_edge_status llava_edge_session_add_image_file(llava_edge_session * session, const char * path) {
    return on_session(session, [&](Session & s) {
        require(path != nullptr, "path is NULL");
        try {
            add_bytes(s, read_file(path, MAX_FILE_BYTES, LLAVA_EDGE_IMAGE_LIMIT));
        } catch (const Error & error) {
            const bool named = std::strstr(error.what(), path) != nullptr;
            fail(error.status, "%s%s%s", named ? "" : path, named ? "" : ": ", error.what());
        }
    });
}

llava_edge_status llava_edge_session_add_image_bytes(llava_edge_session * session, const void * data, size_t size) {
    return on_session(session, [&](Session & s) {
        require(data != nullptr, "data is NULL");
        if (size > MAX_FILE_BYTES) {
            fail(LLAVA_EDGE_IMAGE_LIMIT, "the picture has more than %llu bytes", (unsigned long long) MAX_FILE_BYTES);
        }
        add_bytes(s, std::string(static_cast<const char *>(data), size));
    });
}

static void check_stride(const char * name, size_t * stride, int32_t width) {
    const size_t row = static_cast<size_t>(width) * 3;
    *stride          = *stride == 0 ? row : *stride;
    if (*stride < row) {
        fail(LLAVA_EDGE_INVALID_ARGUMENT, "%s is %zu; expected %zu or more", name, *stride, row);
    }
}

llava_edge_status llava_edge_session_add_image_rgb(llava_edge_session * session, const uint8_t * pixels, int32_t width,
                                                   int32_t height, size_t stride) {
    return on_session(session, [&](Session & s) {
        require(pixels != nullptr, "pixels is NULL");
        check_image_size(width, height);
        check_stride("stride", &stride, width);
        s.add_image(copy_rgb(pixels, width, height, stride));
    });
}

const char * llava_edge_image_formats(void) {
    return image_formats();
}

llava_edge_status llava_edge_session_add_text(llava_edge_session * session, llava_edge_role role, const char * text) {
    return on_session(session, [&](Session & s) {
        require(text != nullptr, "text is NULL");
        s.add_text(role, text);
    });
}

llava_edge_status llava_edge_session_generate(llava_edge_session * session, const llava_edge_generate_params * params,
                                              llava_edge_token_callback callback, void * user_data, llava_edge_result * result) {
    const uint64_t call = session != nullptr ? ++session->session.calls : 0;
    return on_session(session, [&](Session & s) {
        const GenerateParams p = checked(taken(params, llava_edge_generate_params_init, "params"));
        if (result != nullptr) {
            in_range<size_t>("result.struct_size", result->struct_size, sizeof(size_t), 4096);
        }
        const Answering answering(s, call);
        if (s.model.stop.wanted()) {  // while it waited for its turn
            fail(LLAVA_EDGE_STOPPED, "the answer was stopped before it began");
        }
        const Answer &  answer = s.generate(p, [&](const std::string & text) {
            return callback == nullptr || callback(text.c_str(), text.size(), user_data) == 0;
        });
        if (result != nullptr) {
            hand_over(answer, result);
        }
    });
}

void llava_edge_session_stop(llava_edge_session * session) {
    if (session != nullptr) {
        session->session.stop();
    }
}

int32_t llava_edge_session_turns(const llava_edge_session * session) {
    return session != nullptr ? session->session.turn_count.load() : -1;
}

int32_t llava_edge_session_tokens(const llava_edge_session * session) {
    return session != nullptr ? session->session.tokens.load() : -1;
}

llava_edge_status llava_edge_session_truncate(llava_edge_session * session, int32_t n_turns) {
    return on_session(session, [&](Session & s) {
        require(n_turns >= 0, "n_turns is below 0");
        s.truncate(static_cast<size_t>(n_turns));
    });
}

llava_edge_status llava_edge_session_reset(llava_edge_session * session) {
    return on_session(session, [&](Session & s) { s.reset(); });
}

llava_edge_status llava_edge_session_save(llava_edge_session * session, const char * path) {
    return on_session(session, [&](Session & s) {
        require(path != nullptr, "path is NULL");
        s.save(path);
    });
}

llava_edge_status llava_edge_session_load(llava_edge_session * session, const char * path) {
    return on_session(session, [&](Session & s) {
        require(path != nullptr, "path is NULL");
        s.load(path);
    });
}

// A tower alone

void llava_edge_tower_params_init(llava_edge_tower_params * params) {
    if (params != nullptr) {
        *params             = llava_edge_tower_params{};
        params->struct_size = sizeof *params;
    }
}

llava_edge_status llava_edge_tower_load(const char * path, const llava_edge_tower_params * params, llava_edge_tower ** tower) {
    if (tower != nullptr) {
        *tower = nullptr;
    }
    return guarded(nullptr, [&] {
        require(path != nullptr, "path is NULL");
        require(tower != nullptr, "tower is NULL");
        const auto p = taken(params, llava_edge_tower_params_init, "params");
        in_range("n_threads", p.n_threads, 0, max_threads());
        start_llama();
        *tower = new llava_edge_tower{ { path, p.n_threads != 0 ? p.n_threads : default_threads(), p.use_gpu != 0 } };
    });
}

void llava_edge_tower_free(llava_edge_tower * tower) {
    delete tower;
}

int32_t llava_edge_tower_image_size(const llava_edge_tower * tower) {
    return tower != nullptr ? tower->tower.image_size() : 0;
}

int32_t llava_edge_tower_n_tokens(const llava_edge_tower * tower) {
    return tower != nullptr ? tower->tower.n_tokens() : 0;
}

int32_t llava_edge_tower_n_embd(const llava_edge_tower * tower) {
    return tower != nullptr ? tower->tower.n_embd() : 0;
}

llava_edge_status llava_edge_tower_encode(llava_edge_tower * tower, const uint8_t * pixels, size_t stride, float * embeddings,
                                          size_t capacity) {
    return guarded(nullptr, [&] {
        require(tower != nullptr && pixels != nullptr && embeddings != nullptr, "tower, pixels or embeddings is NULL");
        check_stride("stride", &stride, tower->tower.image_size());
        const size_t count = size_t(tower->tower.n_tokens()) * size_t(tower->tower.n_embd());
        if (capacity < count) {
            fail(LLAVA_EDGE_INVALID_ARGUMENT, "capacity is %zu; the picture becomes %zu numbers", capacity, count);
        }
        const auto found = tower->tower.encode(pixels, stride);
        std::copy(found.begin(), found.end(), embeddings);
    });
}

llava_edge_status llava_edge_resize(const uint8_t * pixels, int32_t width, int32_t height, size_t stride, uint8_t * to,
                                    int32_t new_width, int32_t new_height, size_t new_stride) {
    return guarded(nullptr, [&] {
        require(pixels != nullptr && to != nullptr, "pixels or resized is NULL");
        require(width > 0 && height > 0 && new_width > 0 && new_height > 0, "a width or height is below 1");
        check_image_size(width, height);
        check_image_size(new_width, new_height);
        // On the way it never grows beyond the larger of the two: resized() shrinks before it enlarges.
        check_stride("stride", &stride, width);
        check_stride("new_stride", &new_stride, new_width);
        const Image  done = resized(copy_rgb(pixels, width, height, stride), new_width, new_height);
        const size_t row  = size_t(new_width) * 3;
        for (size_t y = 0; y < size_t(new_height); y++) {
            std::memcpy(to + y * new_stride, done.rgb.data() + y * row, row);
        }
    });
}
