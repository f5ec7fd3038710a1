/*
 * stream BUNDLE QUESTION FRAME...: the same question about one frame after another, as a camera gives them.
 *
 * Each frame is a turn of its own: the session is cut back to its beginning before the next, so that the context never
 * fills, and what stands before the picture stays in the KV cache. A frame that equals the one before costs its question
 * alone: neither the vision tower nor the language model reads it again. An answer that takes too long is ended.
 */
#include <stdio.h>
#include <time.h>

#include <llava_edge.h>

#define SECONDS_A_FRAME 10.0

static int in_time(const char *text, size_t length, void *user_data)
{
    const time_t *started = user_data;

    fwrite(text, 1, length, stdout);
    return difftime(time(NULL), *started) > SECONDS_A_FRAME;
}

static llava_edge_status look(llava_edge_session *session, const char *frame, const char *question)
{
    llava_edge_result result;
    llava_edge_status status;
    time_t started = time(NULL);

    llava_edge_result_init(&result);
    status = llava_edge_session_truncate(session, 0);
    if (status == LLAVA_EDGE_OK)
        status = llava_edge_session_add_image_file(session, frame);
    if (status == LLAVA_EDGE_OK)
        status = llava_edge_session_add_text(session, LLAVA_EDGE_USER, question);
    if (status != LLAVA_EDGE_OK)
        return status;
    printf("%s: ", frame);
    status = llava_edge_session_generate(session, NULL, in_time, &started, &result);
    putchar('\n');
    if (status == LLAVA_EDGE_OK)
        fprintf(stderr, "%.3f s to the first token, %d of %d tokens were known\n", result.ttft_seconds,
                (int)result.cached_tokens, (int)result.prompt_tokens);
    return status;
}

int main(int argc, char **argv)
{
    llava_edge_model *model = NULL;
    llava_edge_session *session = NULL;
    int i, failed = 0;

    if (argc < 4) {
        fprintf(stderr, "usage: stream BUNDLE QUESTION FRAME...\n");
        return 2;
    }
    if (llava_edge_model_load(argv[1], NULL, &model) != LLAVA_EDGE_OK ||
        llava_edge_session_create(model, &session) != LLAVA_EDGE_OK) {
        fprintf(stderr, "error: %s\n", llava_edge_last_error());
        llava_edge_model_free(model);
        return 1;
    }
    for (i = 3; i < argc; i++) {
        /* A frame that can't be read is no reason to stop looking. */
        if (look(session, argv[i], argv[2]) != LLAVA_EDGE_OK) {
            fprintf(stderr, "error: %s\n", llava_edge_session_last_error(session));
            failed = 1;
        }
    }
    llava_edge_session_free(session);
    llava_edge_model_free(model);
    return failed;
}
