// threads BUNDLE EXAMPLES [ROUNDS]: several threads use one model, its sessions, a model and a tower of their own, and the
// log at the same time. Every answer must be the one that a thread alone gets. Meant for ThreadSanitizer.

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include <llava_edge.h>

namespace {

constexpr int MAX_TOKENS = 12;

const char * const QUESTIONS[] = { "What animal is in this picture?", "Which colours do you see?" };
const char * const PICTURES[]  = { "cat.jpg", "astronaut.jpg" };

void require(bool right, const char * what) {
    if (!right) {
        std::fprintf(stderr, "error: %s: %s\n", what, llava_edge_last_error());
        std::_Exit(1);
    }
}

llava_edge_model * load(const std::string & bundle) {
    llava_edge_model_params params;
    llava_edge_model_params_init(&params);
    params.n_threads         = 2;
    llava_edge_model * model = nullptr;
    require(llava_edge_model_load(bundle.c_str(), &params, &model) == LLAVA_EDGE_OK, "load");
    return model;
}

// Sets `text` if the answer was made, also if it was cut short.
llava_edge_result ask(llava_edge_session * session, const std::string & picture, const char * question, std::string & text) {
    llava_edge_result result;
    llava_edge_result_init(&result);
    require(llava_edge_session_reset(session) == LLAVA_EDGE_OK, "reset");
    require(llava_edge_session_add_image_file(session, picture.c_str()) == LLAVA_EDGE_OK, "picture");
    require(llava_edge_session_add_text(session, LLAVA_EDGE_USER, question) == LLAVA_EDGE_OK, "text");
    llava_edge_generate_params params;
    llava_edge_generate_params_init(&params);
    params.max_tokens = MAX_TOKENS;
    text.clear();
    const auto grow = [](const char * piece, size_t length, void * data) {
        static_cast<std::string *>(data)->append(piece, length);
        return 0;
    };
    const llava_edge_status status = llava_edge_session_generate(session, &params, grow, &text, &result);
    if (status == LLAVA_EDGE_STOPPED) {
        result.finish_reason = LLAVA_EDGE_FINISH_CANCELLED;
    } else {
        require(status == LLAVA_EDGE_OK, "answer");
    }
    return result;
}

}  // namespace

int main(int argc, char ** argv) {
    if (argc < 3) {
        std::fprintf(stderr, "usage: threads BUNDLE EXAMPLES [ROUNDS]\n");
        return 2;
    }
    const std::string  bundle = argv[1], examples = argv[2];
    const int          rounds = argc > 3 ? std::atoi(argv[3]) : 3;
    llava_edge_model * model  = load(bundle);

    std::vector<std::string> expected;  // of each picture and question
    llava_edge_session *     sessions[3];
    for (auto & session : sessions) {
        require(llava_edge_session_create(model, &session) == LLAVA_EDGE_OK, "session");
    }
    for (const char * picture : PICTURES) {
        for (const char * question : QUESTIONS) {
            expected.emplace_back();
            ask(sessions[0], examples + "/" + picture, question, expected.back());
            require(!expected.back().empty(), "an empty answer");
        }
    }

    std::atomic<int>         asking{ 0 }, cut{ 0 };
    std::vector<std::thread> threads;
    for (size_t n = 0; n < 3; n++) {
        asking++;
        threads.emplace_back([&, n] {
            for (size_t round = 0; round < size_t(rounds) * expected.size(); round++) {
                const size_t      which = (round + n) % expected.size();
                std::string       text;
                const std::string picture = examples + "/" + PICTURES[which / 2];
                const auto        result  = ask(sessions[n], picture, QUESTIONS[which % 2], text);
                if (result.finish_reason == LLAVA_EDGE_FINISH_CANCELLED) {
                    cut++;
                    require(n == 2 && expected[which].compare(0, text.size(), text) == 0, "an answer that was cut short");
                } else {
                    require(text == expected[which], "an answer beside others");
                }
            }
            asking--;
        });
    }
    threads.emplace_back([&] {  // stops one of them, reads what never waits, moves the log
        std::atomic<int> lines{ 0 };
        const auto count = [](llava_edge_log_level, const char *, void * data) { (*static_cast<std::atomic<int> *>(data))++; };
        for (int round = 0; asking > 0; round++) {
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            llava_edge_set_log(round % 2 == 0 ? +count : nullptr, &lines);
            for (llava_edge_session * session : sessions) {
                require(llava_edge_session_turns(session) <= 1 && llava_edge_session_tokens(session) >= 0, "counts");
            }
            if (round % 5 == 4) {
                llava_edge_session_stop(sessions[2]);
            }
            require(llava_edge_session_truncate(nullptr, 0) == LLAVA_EDGE_INVALID_ARGUMENT, "no session");
        }
        llava_edge_set_log(nullptr, nullptr);
    });
    threads.emplace_back([&] {  // sessions come and go; another model has threads of its own
        llava_edge_model *   other   = load(bundle);
        llava_edge_session * session = nullptr;
        while (asking > 0) {
            for (llava_edge_model * owner : { model, other }) {
                const llava_edge_status status = llava_edge_session_create(owner, &session);
                require(status == LLAVA_EDGE_OK, "a session beside others");
                llava_edge_session_free(session);
            }
            require(llava_edge_session_create(other, &session) == LLAVA_EDGE_OK, "a session of the other model");
            std::string text;
            ask(session, examples + "/" + PICTURES[0], QUESTIONS[0], text);
            require(text == expected[0], "an answer of another model");
            llava_edge_session_free(session);
        }
        llava_edge_model_free(other);
    });
    for (std::thread & thread : threads) {
        thread.join();
    }
    for (llava_edge_session * session : sessions) {
        llava_edge_session_free(session);
    }
    llava_edge_model_free(model);
    std::printf("%zu answers, %d of them cut short\n", size_t(rounds) * expected.size() * 3, cut.load());
    return 0;
}
