/* describe BUNDLE IMAGE QUESTION: the answer on stdout, as `llava-edge chat --temperature 0` gives it. */
#include <stdio.h>

#include <llava_edge.h>

static int show(const char *text, size_t length, void *user_data)
{
    (void)user_data;
    fwrite(text, 1, length, stdout);
    fflush(stdout);
    return 0;
}

int main(int argc, char **argv)
{
    llava_edge_model *model = NULL;
    llava_edge_session *session = NULL;
    llava_edge_status status;

    if (argc != 4) {
        fprintf(stderr, "usage: describe BUNDLE IMAGE QUESTION\n");
        return 2;
    }
    status = llava_edge_model_load(argv[1], NULL, &model);
    if (status == LLAVA_EDGE_OK)
        status = llava_edge_session_create(model, &session);
    if (status == LLAVA_EDGE_OK)
        status = llava_edge_session_add_image_file(session, argv[2]);
    if (status == LLAVA_EDGE_OK)
        status = llava_edge_session_add_text(session, LLAVA_EDGE_USER, argv[3]);
    if (status == LLAVA_EDGE_OK)
        status = llava_edge_session_generate(session, NULL, show, NULL, NULL);
    if (status == LLAVA_EDGE_OK)
        putchar('\n');
    else
        fprintf(stderr, "error: %s\n", llava_edge_last_error());
    llava_edge_session_free(session);
    llava_edge_model_free(model);
    return status == LLAVA_EDGE_OK ? 0 : 1;
}
