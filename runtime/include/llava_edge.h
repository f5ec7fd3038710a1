/*
 * llava_edge.h: ask a small vision-language model about pictures, from C.
 *
 * The simple use, in the order of the calls:
 *
 *     llava_edge_model_load()            a bundle: the directory that `llava-edge convert` writes
 *     llava_edge_session_create()        a conversation with it
 *     llava_edge_session_add_image_*()   pictures of the next question
 *     llava_edge_session_add_text()      the question
 *     llava_edge_session_generate()      the answer, piece by piece
 *
 * and again from add_image or add_text on: a session keeps what was evaluated, so a second question about the same
 * picture costs the question alone. examples/describe.c is the whole of it.
 *
 * Conventions that hold for every function here:
 *
 * - Texts are UTF-8 and end with a zero byte. A text that a function takes is copied; the caller may free it at once.
 * - Functions that can fail return a llava_edge_status. LLAVA_EDGE_OK is 0. What a function writes through its
 *   pointers is defined only when it returned LLAVA_EDGE_OK, but for handles, which are set to NULL on failure.
 * - Why a call failed stands, in one line for people, in llava_edge_last_error() (the calling thread's last failure)
 *   and in the ..._last_error() of the handle that the call worked on. The latter's text may be read only while no
 *   other thread uses that handle; threads that share a handle use the former.
 * - Handles are made by ..._load or ..._create and belong to the caller, who frees them. Freeing NULL does nothing.
 * - Parameter structs begin with struct_size, which their init function sets. So a program that was compiled with an
 *   older header runs with a newer library, whose new fields then have their defaults.
 * - No C++ exception leaves a function, and bad files, pictures and arguments never end the process.
 * - Threads: functions on different models may run at the same time. Functions on one model and on its sessions may be
 *   called from any thread; they wait for each other. llava_edge_session_stop() and the functions that return a number
 *   or a text never wait. A handle must not be freed while another thread uses it. A token callback must call none of
 *   the functions of its model and that model's sessions that wait: they return LLAVA_EDGE_BUSY.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef LLAVA_EDGE_H
#define LLAVA_EDGE_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(LLAVA_EDGE_SHARED)
#if defined(LLAVA_EDGE_BUILD)
#define LLAVA_EDGE_API __declspec(dllexport)
#else
#define LLAVA_EDGE_API __declspec(dllimport)
#endif
#elif defined(__GNUC__)
#define LLAVA_EDGE_API __attribute__((visibility("default")))
#else
#define LLAVA_EDGE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Version -------------------------------------------------------------------------------------------------- */

#define LLAVA_EDGE_VERSION_MAJOR 0
#define LLAVA_EDGE_VERSION_MINOR 1
#define LLAVA_EDGE_VERSION_PATCH 0
#define LLAVA_EDGE_VERSION_STRING "0.1.0"
/* Comparable: 100 is 0.1.0. */
#define LLAVA_EDGE_VERSION_NUMBER                                                                                      \
    (LLAVA_EDGE_VERSION_MAJOR * 10000 + LLAVA_EDGE_VERSION_MINOR * 100 + LLAVA_EDGE_VERSION_PATCH)

/* LLAVA_EDGE_VERSION_NUMBER of the library that runs, which may be newer than the header. Any thread. */
LLAVA_EDGE_API int32_t llava_edge_version_number(void);

/* LLAVA_EDGE_VERSION_STRING of the library that runs. The text is static. Any thread. */
LLAVA_EDGE_API const char *llava_edge_version(void);

/* ---- Status --------------------------------------------------------------------------------------------------- */

/* The numbers are pinned: they never change their meaning, and new ones go into the gaps. */
typedef enum llava_edge_status {
    LLAVA_EDGE_OK = 0,
    LLAVA_EDGE_INVALID_ARGUMENT = 10,  /* an argument is NULL, out of range, no UTF-8 or of an unknown size */
    LLAVA_EDGE_BUSY = 11,              /* called from a callback of the same model */
    LLAVA_EDGE_NOT_FOUND = 20,         /* no such file */
    LLAVA_EDGE_IO = 21,                /* a file can't be read or written */
    LLAVA_EDGE_MODEL_INVALID = 30,     /* a model's file is damaged, or its files don't belong together */
    LLAVA_EDGE_MODEL_UNSUPPORTED = 31, /* a sound model of a kind that this library does not run */
    LLAVA_EDGE_SELF_CHECK_FAILED = 32, /* the vision tower computes something else than it should on this machine */
    LLAVA_EDGE_IMAGE_INVALID = 40,     /* no picture, or a damaged one */
    LLAVA_EDGE_IMAGE_LIMIT = 41,       /* more pixels, or a longer strip, than is allowed */
    LLAVA_EDGE_IMAGE_UNSUPPORTED = 42, /* a format that this build does not read */
    LLAVA_EDGE_CONTEXT_FULL = 50,      /* the conversation and the question don't fit the context */
    LLAVA_EDGE_STOPPED = 51,           /* llava_edge_session_stop() came before there was anything of an answer */
    LLAVA_EDGE_STATE_INVALID = 60,     /* a saved session that is damaged, or of another model */
    LLAVA_EDGE_OUT_OF_MEMORY = 70,
    LLAVA_EDGE_ENGINE = 80,            /* llama.cpp could not evaluate a batch */
    LLAVA_EDGE_INTERNAL = 127          /* a defect of this library; please report it */
} llava_edge_status;

/* The status in a few words. The text is static; an unknown number gives "unknown status". Any thread. */
LLAVA_EDGE_API const char *llava_edge_status_string(llava_edge_status status);

/* Why the calling thread's last failing call failed; "" if none did. Valid until that thread's next failing call. */
LLAVA_EDGE_API const char *llava_edge_last_error(void);

/* ---- Log ------------------------------------------------------------------------------------------------------ */

typedef enum llava_edge_log_level {
    LLAVA_EDGE_LOG_DEBUG = 1,
    LLAVA_EDGE_LOG_INFO = 2,
    LLAVA_EDGE_LOG_WARNING = 3,
    LLAVA_EDGE_LOG_ERROR = 4
} llava_edge_log_level;

/*
 * One line without its line break. May come from any thread. `text` is valid during the call. The callback must call no
 * function of this library: it would wait for itself.
 */
typedef void (*llava_edge_log_callback)(llava_edge_log_level level, const char *text, void *user_data);

/*
 * Say where the lines of this library and of llama.cpp go; NULL, as at the start, is nowhere. One setting for the
 * process. The first model or tower that is loaded points llama.cpp's log here, so a program that also uses llama.cpp
 * itself should set llama.cpp's callback after that. Any thread, but not from within a log callback.
 */
LLAVA_EDGE_API void llava_edge_set_log(llava_edge_log_callback callback, void *user_data);

/* ---- Models --------------------------------------------------------------------------------------------------- */

/* A language model with its vision tower. Large: tens of megabytes to several gigabytes. */
typedef struct llava_edge_model llava_edge_model;

typedef struct llava_edge_model_params {
    size_t struct_size;   /* set by the init function */
    int32_t n_ctx;        /* context in tokens; 0: the model's own, at most 4096 */
    int32_t n_threads;    /* threads that compute, at most four a core (or 64); 0: one a physical core */
    int32_t n_gpu_layers; /* layers of the language model on a GPU; -1: all where llama.cpp has a GPU, else none. With
                             0 the vision tower stays on the CPU too */
    int32_t image_tokens; /* tokens of a picture, or of each of its tiles, 1 or more; 0: the manifest's default */
    int32_t self_check;   /* not 0 (the default): compare the tower with the bundle's probe when it is loaded, which
                             costs the time of one picture */
} llava_edge_model_params;

/* Fill in struct_size and the defaults. NULL is ignored. Any thread. */
LLAVA_EDGE_API void llava_edge_model_params_init(llava_edge_model_params *params);

/*
 * Load a bundle from its directory.
 *
 * params: NULL for the defaults. model: the new handle; free it with llava_edge_model_free().
 * All files are checked before they are used: the manifest key by key, the two GGUF files up to every shape and offset.
 * Their checksums are not compared; `llava-edge verify` does that. What llama.cpp refuses for lack of memory can't be
 * told from what it refuses otherwise, and is MODEL_INVALID too.
 * Fails with NOT_FOUND, IO, MODEL_INVALID, MODEL_UNSUPPORTED (towers that are none of CLIP, SigLIP and DINOv2,
 * bundles without mmproj), SELF_CHECK_FAILED, INVALID_ARGUMENT, OUT_OF_MEMORY. Any thread.
 */
LLAVA_EDGE_API llava_edge_status llava_edge_model_load(const char *directory, const llava_edge_model_params *params,
                                                       llava_edge_model **model);

/* Free a model. All its sessions must have been freed before. NULL is ignored. */
LLAVA_EDGE_API void llava_edge_model_free(llava_edge_model *model);

/*
 * Why the last failing call on this model failed; "" if none did. Valid until the next failing call on it, so only
 * while no other thread uses it.
 */
LLAVA_EDGE_API const char *llava_edge_model_last_error(const llava_edge_model *model);

/* The manifest's name of the model. Valid as long as the model; "" for NULL. */
LLAVA_EDGE_API const char *llava_edge_model_name(const llava_edge_model *model);

/* Tokens that the context holds. 0 for NULL. */
LLAVA_EDGE_API int32_t llava_edge_model_n_ctx(const llava_edge_model *model);

/* Threads that compute. 0 for NULL. */
LLAVA_EDGE_API int32_t llava_edge_model_n_threads(const llava_edge_model *model);

/* Tokens that a picture takes in the context, or each of its tiles where the model looks at tiles. 0 for NULL. */
LLAVA_EDGE_API int32_t llava_edge_model_image_tokens(const llava_edge_model *model);

/* ---- Sessions ------------------------------------------------------------------------------------------------- */

/*
 * A conversation. All sessions of a model share its KV cache: each finds its own beginning there, or evaluates it
 * again. A question that fails (a full context, say) leaves the conversation as it was.
 */
typedef struct llava_edge_session llava_edge_session;

/* Who says a text. */
typedef enum llava_edge_role {
    LLAVA_EDGE_SYSTEM = 0,   /* before the first turn only; replaces the model's own system text, "" is none */
    LLAVA_EDGE_USER = 1,     /* the question; several texts of one question are put together as they are */
    LLAVA_EDGE_ASSISTANT = 2 /* an answer that the program gives itself; ends the turn, as an example to follow */
} llava_edge_role;

typedef enum llava_edge_finish_reason {
    LLAVA_EDGE_FINISH_STOP = 0,     /* the model ended its answer, or a stop text came */
    LLAVA_EDGE_FINISH_LENGTH = 1,   /* max_tokens were written, or the context is full */
    LLAVA_EDGE_FINISH_CANCELLED = 2 /* the callback or llava_edge_session_stop() ended it */
} llava_edge_finish_reason;

typedef struct llava_edge_generate_params {
    size_t struct_size;   /* set by the init function */
    int32_t max_tokens;   /* longest answer, 1 or more; default 256 */
    float temperature;    /* 0 (the default): the likeliest token every time; up to 100 */
    float top_p;          /* 0 to 1: the likeliest tokens that make up this share; default 0.95; 1 is off */
    float min_p;          /* 0 to 1: tokens at least this likely, relative to the likeliest; default 0.05; 0 is off */
    int32_t top_k;        /* the likeliest so many; default 40; 0 is off */
    int64_t seed;         /* 0 to 2^32 - 1: the same answer every time; -1 (the default): a new one each time */
    const char *const *stop; /* texts that end the answer and are not part of it; NULL if n_stop is 0 */
    size_t n_stop;           /* how many; at most 64 */
} llava_edge_generate_params;

/* What became of an answer. The pointers stay valid until the next call on the session that succeeds in changing it. */
typedef struct llava_edge_result {
    size_t struct_size;       /* set by the init function */
    const char *text;         /* the whole answer */
    const int32_t *token_ids; /* its tokens, without the one that ended it */
    int32_t completion_tokens;
    int32_t prompt_tokens; /* the whole conversation up to the answer */
    int32_t cached_tokens; /* of these, the ones that were in the KV cache already and cost nothing */
    int32_t image_tokens;  /* of these, the ones of pictures */
    llava_edge_finish_reason finish_reason;
    double encode_seconds;  /* the vision tower, for pictures not seen before */
    double prefill_seconds; /* the language model reading the prompt */
    double ttft_seconds;    /* from the call until the first token: both, and little else */
    double decode_seconds;  /* the tokens after the first, without the time that the callback took */
} llava_edge_result;

/* Fill in struct_size and the defaults (zeros). NULL is ignored. Any thread. */
LLAVA_EDGE_API void llava_edge_generate_params_init(llava_edge_generate_params *params);
LLAVA_EDGE_API void llava_edge_result_init(llava_edge_result *result);

/*
 * Called after each token with the text that is sure now to belong to the answer: whole characters, often none.
 * `text` ends with a zero byte and is valid during the call. Return 0 to go on, anything else to end the answer. It must
 * not free the session, and calls on the model's sessions other than llava_edge_session_stop() fail with BUSY.
 */
typedef int (*llava_edge_token_callback)(const char *text, size_t length, void *user_data);

/*
 * Begin a conversation. Free it with llava_edge_session_free() before its model.
 * Fails with INVALID_ARGUMENT, BUSY, OUT_OF_MEMORY.
 */
LLAVA_EDGE_API llava_edge_status llava_edge_session_create(llava_edge_model *model, llava_edge_session **session);

/* Free a session. The model stays loaded. NULL is ignored. */
LLAVA_EDGE_API void llava_edge_session_free(llava_edge_session *session);

/*
 * Why the last failing call on this session failed; "" if none did. Valid until the next failing call on it, so only
 * while no other thread uses it.
 */
LLAVA_EDGE_API const char *llava_edge_session_last_error(const llava_edge_session *session);

/*
 * Add a picture to the next question; its pictures stand before its text, in the order of the calls. The picture is
 * read now and the vision tower runs in llava_edge_session_generate(), not again for a picture that the model's sessions
 * have seen lately. Limits: 40 megapixels (200 for a JPEG of one scan, which is decoded at a smaller size then;
 * progressive ones have several), an aspect of 50:1, files of 256 MiB. EXIF's orientation is applied; transparency
 * shows the manifest's pad colour.
 *
 * file, bytes: JPEG and PNG as far as the library was built with them (llava_edge_image_formats()), and binary PPM.
 * rgb: 8 bits a channel, R G B, `stride` bytes from one row to the next (0: 3 * width). The pixels are copied.
 *
 * Fail with NOT_FOUND, IO, IMAGE_INVALID, IMAGE_LIMIT, IMAGE_UNSUPPORTED, INVALID_ARGUMENT, OUT_OF_MEMORY, BUSY.
 */
LLAVA_EDGE_API llava_edge_status llava_edge_session_add_image_file(llava_edge_session *session, const char *path);
LLAVA_EDGE_API llava_edge_status llava_edge_session_add_image_bytes(llava_edge_session *session, const void *data,
                                                                    size_t size);
LLAVA_EDGE_API llava_edge_status llava_edge_session_add_image_rgb(llava_edge_session *session, const uint8_t *pixels,
                                                                  int32_t width, int32_t height, size_t stride);

/* The formats of files that this build reads, as in "JPEG, PNG, PPM". The text is static. Any thread. */
LLAVA_EDGE_API const char *llava_edge_image_formats(void);

/*
 * Add text. Names of special tokens in it are taken by the letter, so no text can forge a turn or a picture. Should be
 * in Unicode's normal form C, as keyboards write it.
 * LLAVA_EDGE_ASSISTANT runs the vision tower for the question's pictures that were not seen before.
 * Fails with INVALID_ARGUMENT (not UTF-8; a system text after the first turn, or in a format that has no place for
 * one; an answer without a question), BUSY, OUT_OF_MEMORY; an answer also with ENGINE, MODEL_INVALID.
 */
LLAVA_EDGE_API llava_edge_status llava_edge_session_add_text(llava_edge_session *session, llava_edge_role role,
                                                             const char *text);

/*
 * Answer the question that was added.
 *
 * params: NULL for the defaults. callback: NULL if only the result matters; user_data is handed to it.
 * result: NULL if only the callback matters.
 * An answer that is cancelled stays in the conversation as far as it came; without a single token the turn is not made,
 * and the question stays to be asked again.
 * Fails with INVALID_ARGUMENT (no question, a parameter out of range), CONTEXT_FULL, STOPPED, ENGINE, MODEL_INVALID,
 * OUT_OF_MEMORY, BUSY; then the conversation is as it was, and the question that was added is still there.
 */
LLAVA_EDGE_API llava_edge_status llava_edge_session_generate(llava_edge_session *session,
                                                             const llava_edge_generate_params *params,
                                                             llava_edge_token_callback callback, void *user_data,
                                                             llava_edge_result *result);

/*
 * End the answer that is being made, and those of this session that still wait for their turn: they fail with STOPPED.
 * Does nothing if there is none, so an answer that is asked for later is not ended. Any thread, also from a token
 * callback. Never waits.
 */
LLAVA_EDGE_API void llava_edge_session_stop(llava_edge_session *session);

/* Turns so far: questions with their answers. -1 for NULL. */
LLAVA_EDGE_API int32_t llava_edge_session_turns(const llava_edge_session *session);

/* Tokens of the KV cache that the conversation's last evaluation filled. -1 for NULL. */
LLAVA_EDGE_API int32_t llava_edge_session_tokens(const llava_edge_session *session);

/* Forget everything after the first n_turns turns, and what was added to the next question. 0 to the number of turns. */
LLAVA_EDGE_API llava_edge_status llava_edge_session_truncate(llava_edge_session *session, int32_t n_turns);

/* Forget all turns, the system text and what was added to the next question. */
LLAVA_EDGE_API llava_edge_status llava_edge_session_reset(llava_edge_session *session);

/*
 * Write the conversation to a file, under a temporary name that is then renamed: turns, the embeddings of its pictures
 * and, if the KV cache holds it, its part of that. What was added to the next question is not written.
 * Fails with IO, OUT_OF_MEMORY, ENGINE, BUSY.
 */
LLAVA_EDGE_API llava_edge_status llava_edge_session_save(llava_edge_session *session, const char *path);

/*
 * Replace the conversation by one that llava_edge_session_save() wrote with the same model, settings and version of
 * llama.cpp. A damaged file is refused by its checksum. That protects from accidents, not from forgery: load only files
 * of your own. Fails with NOT_FOUND, IO, STATE_INVALID, CONTEXT_FULL, ENGINE, OUT_OF_MEMORY, BUSY; then the
 * conversation is as it was.
 */
LLAVA_EDGE_API llava_edge_status llava_edge_session_load(llava_edge_session *session, const char *path);

/* ---- Advanced: a vision tower alone --------------------------------------------------------------------------- */

/* The tower and projector of an mmproj file. A tower's calls wait for each other; otherwise as for models. */
typedef struct llava_edge_tower llava_edge_tower;

typedef struct llava_edge_tower_params {
    size_t struct_size; /* set by the init function */
    int32_t n_threads;  /* 0: one a physical core */
    int32_t use_gpu;    /* not 0: on the first GPU that ggml offers, if there is one; default 0 */
} llava_edge_tower_params;

/* Fill in struct_size and the defaults. NULL is ignored. Any thread. */
LLAVA_EDGE_API void llava_edge_tower_params_init(llava_edge_tower_params *params);

/*
 * Load an mmproj GGUF: CLIP, SigLIP or DINOv2 with a linear or MLP projector. params: NULL for the defaults.
 * Fails as llava_edge_model_load() does. Any thread.
 */
LLAVA_EDGE_API llava_edge_status llava_edge_tower_load(const char *path, const llava_edge_tower_params *params,
                                                       llava_edge_tower **tower);

/* Free a tower. NULL is ignored. */
LLAVA_EDGE_API void llava_edge_tower_free(llava_edge_tower *tower);

/* Side of the square picture that the tower reads, in pixels. 0 for NULL. */
LLAVA_EDGE_API int32_t llava_edge_tower_image_size(const llava_edge_tower *tower);

/* Tokens that it makes of a picture. 0 for NULL. */
LLAVA_EDGE_API int32_t llava_edge_tower_n_tokens(const llava_edge_tower *tower);

/* Numbers of each token. 0 for NULL. */
LLAVA_EDGE_API int32_t llava_edge_tower_n_embd(const llava_edge_tower *tower);

/*
 * Encode a picture that already has the tower's size: n_tokens x n_embd numbers, token by token, into `embeddings`,
 * which has room for `capacity` of them. pixels: 8 bits a channel, R G B, `stride` bytes from row to row (0: 3 * size).
 * Fails with INVALID_ARGUMENT, ENGINE, MODEL_INVALID (the result is not finite), OUT_OF_MEMORY.
 */
LLAVA_EDGE_API llava_edge_status llava_edge_tower_encode(llava_edge_tower *tower, const uint8_t *pixels, size_t stride,
                                                         float *embeddings, size_t capacity);

/* ---- Advanced: preprocessing ---------------------------------------------------------------------------------- */

/*
 * Resize a picture as the BICUBIC of Pillow 13 does, bit for bit. Both have 8 bits a channel, R G B; strides are bytes
 * from row to row (0: 3 * width). Fails with INVALID_ARGUMENT, IMAGE_LIMIT, OUT_OF_MEMORY. Any thread.
 */
LLAVA_EDGE_API llava_edge_status llava_edge_resize(const uint8_t *pixels, int32_t width, int32_t height, size_t stride,
                                                   uint8_t *resized, int32_t new_width, int32_t new_height,
                                                   size_t new_stride);

#ifdef __cplusplus
}
#endif

#endif /* LLAVA_EDGE_H */
