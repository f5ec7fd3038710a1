// runner BUNDLE EXAMPLES CASES [THREADS]: runs the cases of the conformance suite through the C functions, and prints
// what each gave as a line of JSON. tests/support/conformance.py is the same in Python.

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <llava_edge.h>

#include "error.h"
#include "json.h"

using llava_edge::Json;

namespace {

[[noreturn]] void give_up(const std::string & what) {
    std::fprintf(stderr, "error: %s: %s\n", what.c_str(), llava_edge_last_error());
    std::exit(1);
}

const Json * find(const Json & object, const char * key) {
    for (const auto & [name, value] : object.members) {
        if (name == key) {
            return &value;
        }
    }
    return nullptr;
}

double number(const Json & object, const char * key, double missing) {
    const Json * value = find(object, key);
    return value != nullptr ? value->number : missing;
}

std::string quoted(const std::string & text) {
    std::string out = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\' || static_cast<unsigned char>(c) < ' ') {
            out += llava_edge::format("\\u%04x", static_cast<unsigned>(c));
        } else {
            out += c;
        }
    }
    return out + "\"";
}

// The pattern that `picture` of conformance.py makes.
std::vector<uint8_t> pattern(int width, int height, int n) {
    std::vector<uint8_t> pixels;
    for (int y = 0; y < height; y++) {
        for (int x = 0; x < width; x++) {
            pixels.push_back(static_cast<uint8_t>(x * 255 / width));
            pixels.push_back(static_cast<uint8_t>(y * 255 / height));
            pixels.push_back(static_cast<uint8_t>((x * y + n * (x + 2 * y) + n * 37) % 256));
        }
    }
    return pixels;
}

struct Runner {
    std::string          bundle, examples;
    int                  threads = 0;
    llava_edge_model *   model   = nullptr;
    llava_edge_session * session = nullptr;
    std::string          settings;

    ~Runner() { close(); }

    void close() {
        llava_edge_session_free(session);
        llava_edge_model_free(model);
        session = nullptr;
        model   = nullptr;
    }

    void load(const Json & wanted) {
        const int         n_ctx = static_cast<int>(number(wanted, "n_ctx", 0)), tokens = static_cast<int>(number(wanted, "image_tokens", 0));
        const std::string same = llava_edge::format("%d %d", n_ctx, tokens);
        if (model == nullptr || same != settings) {
            close();
            llava_edge_model_params params;
            llava_edge_model_params_init(&params);
            params.n_ctx        = n_ctx;
            params.image_tokens = tokens;
            params.n_threads    = threads;
            if (llava_edge_model_load(bundle.c_str(), &params, &model) != LLAVA_EDGE_OK) {
                give_up(bundle);
            }
            settings = same;
        }
        llava_edge_session_free(session);
        if (llava_edge_session_create(model, &session) != LLAVA_EDGE_OK) {
            give_up("session");
        }
    }

    void add_image(const Json & source) {
        llava_edge_status status;
        if (source.kind == Json::Kind::Text) {
            status = llava_edge_session_add_image_file(session, (examples + "/" + source.text).c_str());
        } else {
            const int  width = static_cast<int>(source.list[0].number), height = static_cast<int>(source.list[1].number);
            const auto pixels = pattern(width, height, static_cast<int>(source.list[2].number));
            status            = llava_edge_session_add_image_rgb(session, pixels.data(), width, height, 0);
        }
        if (status != LLAVA_EDGE_OK) {
            give_up("picture");
        }
    }

    std::string ask(const Json & step) {
        if (const Json * images = find(step, "images")) {
            for (const Json & source : images->list) {
                add_image(source);
            }
        }
        if (llava_edge_session_add_text(session, LLAVA_EDGE_USER, find(step, "ask")->text.c_str()) != LLAVA_EDGE_OK) {
            give_up("text");
        }
        llava_edge_generate_params params;
        llava_edge_generate_params_init(&params);
        params.max_tokens  = static_cast<int32_t>(number(step, "max_tokens", params.max_tokens));
        params.temperature = static_cast<float>(number(step, "temperature", 0));
        params.top_k       = static_cast<int32_t>(number(step, "top_k", params.top_k));
        params.top_p       = static_cast<float>(number(step, "top_p", static_cast<double>(params.top_p)));
        params.min_p       = static_cast<float>(number(step, "min_p", static_cast<double>(params.min_p)));
        params.seed        = static_cast<int64_t>(number(step, "seed", -1));
        std::vector<const char *> stop;
        if (const Json * texts = find(step, "stop")) {
            for (const Json & text : texts->list) {
                stop.push_back(text.text.c_str());
            }
        }
        params.stop   = stop.data();
        params.n_stop = stop.size();
        std::string       shown;
        const auto        show = [](const char * text, size_t length, void * data) {
            static_cast<std::string *>(data)->append(text, length);
            return 0;
        };
        llava_edge_result result;
        llava_edge_result_init(&result);
        const llava_edge_status status = llava_edge_session_generate(session, &params, show, &shown, &result);
        if (status != LLAVA_EDGE_OK) {
            if (llava_edge_session_truncate(session, llava_edge_session_turns(session)) != LLAVA_EDGE_OK) {
                give_up("truncate");
            }
            return llava_edge::format("{\"status\": %d}", static_cast<int>(status));
        }
        if (shown != result.text) {
            give_up("the pieces are not the answer");
        }
        std::string ids;
        for (int i = 0; i < result.completion_tokens; i++) {
            ids += (i == 0 ? "" : ", ") + std::to_string(result.token_ids[i]);
        }
        return llava_edge::format(
            "{\"status\": 0, \"ids\": [%s], \"text\": %s, \"finish\": %d, \"prompt_tokens\": %d, \"cached_tokens\": %d, "
            "\"image_tokens\": %d}",
            ids.c_str(), quoted(shown).c_str(), static_cast<int>(result.finish_reason), result.prompt_tokens, result.cached_tokens,
            result.image_tokens);
    }

    void save_and_load() {
        const std::string path = llava_edge::format("%s/llava-edge-conformance-%ld.session",
                                                    std::getenv("TMPDIR") != nullptr ? std::getenv("TMPDIR") : "/tmp",
                                                    static_cast<long>(getpid()));
        bool right = llava_edge_session_save(session, path.c_str()) == LLAVA_EDGE_OK && llava_edge_session_reset(session) == LLAVA_EDGE_OK &&
                     llava_edge_session_load(session, path.c_str()) == LLAVA_EDGE_OK;
        std::remove(path.c_str());
        if (!right) {
            give_up("saved session");
        }
    }

    std::string run(const Json & test) {
        load(*find(test, "model"));
        if (const Json * system = find(test, "system")) {
            if (llava_edge_session_add_text(session, LLAVA_EDGE_SYSTEM, system->text.c_str()) != LLAVA_EDGE_OK) {
                give_up("system text");
            }
        }
        std::string found;
        for (const Json & step : find(test, "steps")->list) {
            if (const Json * turns = find(step, "truncate")) {
                if (llava_edge_session_truncate(session, static_cast<int32_t>(turns->integer)) != LLAVA_EDGE_OK) {
                    give_up("truncate");
                }
            } else if (find(step, "save") != nullptr) {
                save_and_load();
            } else {
                found += (found.empty() ? "" : ", ") + ask(step);
            }
        }
        return "{\"name\": " + quoted(find(test, "name")->text) + ", \"found\": [" + found + "]}";
    }
};

}  // namespace

int main(int argc, char ** argv) {
    if (argc < 4) {
        std::fprintf(stderr, "usage: runner BUNDLE EXAMPLES CASES [THREADS]\n");
        return 2;
    }
    try {
        std::ifstream     file(argv[3], std::ios::binary);
        const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
        const Json        suite = llava_edge::parse_json(text);
        Runner            runner;
        runner.bundle   = argv[1];
        runner.examples = argv[2];
        runner.threads  = argc > 4 ? std::atoi(argv[4]) : 0;
        for (const Json & test : find(suite, "cases")->list) {
            std::printf("%s\n", runner.run(test).c_str());
            std::fflush(stdout);
        }
    } catch (const std::exception & error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
    return 0;
}
