#include <algorithm>
#include <random>

#include "json.h"
#include "model.h"
#include "sha256.h"

namespace llava_edge {

namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

std::vector<std::string> keys(const Turn & turn) {
    std::vector<std::string> found;
    for (const auto & [key, embeddings] : turn.pictures) {
        found.push_back(key);
    }
    return found;
}

bool is_blank(const std::string & text) {
    return text.find_first_not_of(" \t\n\r\v\f") == std::string::npos;
}

}  // namespace

void Session::add_image(Image image) {
    const ImageSpec & spec = model.bundle.image;
    if (spec.mode != FitMode::Anyres) {
        image = fitted(std::move(image), spec);
    }
    Sha256            hash;
    const std::string head = format("RGB %d %d ", image.width, image.height);
    hash.add(head.data(), head.size());
    hash.add(image.rgb.data(), image.rgb.size());
    Picture picture{ hash.digest(), {}, {} };
    if (spec.mode == FitMode::Anyres) {
        picture.parts = split(image, spec, picture.layout);
    } else {
        picture.parts.push_back(std::move(image));
    }
    pending_.push_back(std::move(picture));
}

void Session::add_text(llava_edge_role role, const std::string & text) {
    if (!is_utf8(text)) {
        fail(LLAVA_EDGE_INVALID_ARGUMENT, "the text is not UTF-8");
    }
    if (role == LLAVA_EDGE_USER) {
        question_ += text;
        asked_ = true;
    } else if (role == LLAVA_EDGE_SYSTEM) {
        if (!turns.empty()) {
            fail(LLAVA_EDGE_INVALID_ARGUMENT, "a system text can't follow a turn; reset the session first");
        }
        turn_segments(model.bundle.prompt, 0, {}, "?", text);  // a format without a place for it refuses it here
        system_ = text;
    } else if (role == LLAVA_EDGE_ASSISTANT) {
        Turn turn   = prepare(Clock::now());
        turn.answer = text;
        turn.given  = true;
        turns.push_back(std::move(turn));
        truncate(turns.size());
    } else {
        fail(LLAVA_EDGE_INVALID_ARGUMENT, "role is %d; expected LLAVA_EDGE_SYSTEM, _USER or _ASSISTANT", static_cast<int>(role));
    }
}

// The turn that is asked for, its pictures encoded. Nothing of the conversation changes.
Turn Session::prepare(Clock::time_point started) {
    if (pending_.empty() && is_blank(question_)) {
        fail(LLAVA_EDGE_INVALID_ARGUMENT, asked_ ? "the question is empty" : "there is no question: add a text or a picture first");
    }
    Turn turn;
    turn.question = question_;
    for (const Picture & picture : pending_) {
        turn.pictures.emplace_back(picture.key, model.encode(picture));
    }
    answer                = {};
    answer.encode_seconds = since(started);
    return turn;
}

const Answer & Session::generate(const GenerateParams & params, const std::function<bool(const std::string &)> & show) {
    const auto started  = Clock::now();
    Answer     previous = std::move(answer);  // its text is still the caller's if this fails
    try {
        Turn       turn    = prepare(started);
        const auto encoded = Clock::now();
        answer.prefill         = model.cache.prefill(units(&turn), pictures(&turn));
        answer.prefill_seconds = since(encoded);
        answer.ttft_seconds    = since(started);
        loop(params, show);
        tokens = model.cache.tokens();
        if (answer.finish != LLAVA_EDGE_FINISH_CANCELLED || !answer.ids.empty()) {
            turn.answer = answer.text;
            turn.ids    = answer.ids;
            turns.push_back(std::move(turn));
            truncate(turns.size());
        }
        return answer;
    } catch (...) {
        answer = std::move(previous);
        throw;
    }
}

// Logits to token, token to text, until something ends the answer.
void Session::loop(const GenerateParams & params, const std::function<bool(const std::string &)> & show) {
    std::vector<std::string> stop = model.stop_texts;
    stop.insert(stop.end(), params.stop.begin(), params.stop.end());
    TextStream stream(stop);
    Sampler    sampler(params.sampling);
    size_t     shown   = 0;  // tokens whose text is sure to belong to the answer
    bool       first   = true;
    auto       started = Clock::now();
    for (bool done = false; !done;) {
        if (!first) {
            started = Clock::now();
            try {
                model.cache.append(answer.ids.back());
            } catch (const Error & error) {
                if (error.status != LLAVA_EDGE_STOPPED) {
                    throw;
                }
                break;
            }
        }
        const llama_token token = sampler.choose(model.engine.logits(), model.engine.n_vocab);
        std::string       text;
        const auto        finish = [&](llava_edge_finish_reason reason) {
            text += stream.flush();
            answer.finish = reason;
            done          = true;
        };
        const bool ends = std::find(model.stop_ids.begin(), model.stop_ids.end(), token) != model.stop_ids.end();
        if (ends || model.engine.is_end(token)) {
            finish(LLAVA_EDGE_FINISH_STOP);
        } else {
            std::string piece = model.engine.piece(token);
            if (model.engine.is_spm() && answer.ids.empty() && !piece.empty() && piece[0] == ' ') {
                piece.erase(0, 1);
            }
            text = stream.push(piece);
            if (stream.stopped()) {
                answer.ids.resize(shown);
                answer.finish = LLAVA_EDGE_FINISH_STOP;
                done          = true;
            } else {
                answer.ids.push_back(token);
                shown = stream.undecided() ? shown : answer.ids.size();
                if (model.cache.free() < 1 || answer.ids.size() == static_cast<size_t>(params.max_tokens)) {
                    finish(LLAVA_EDGE_FINISH_LENGTH);
                }
            }
        }
        answer.text += text;
        (first ? answer.ttft_seconds : answer.decode_seconds) += since(started);
        first = false;
        if (!show(text) || model.stop.wanted()) {
            break;  // an answer that has ended already keeps its reason
        }
    }
}

// Everything that the model reads: the turns, and the one that is asked for.
std::vector<Unit> Session::units(const Turn * next) {
    std::vector<Segment> segments;
    const auto           add = [&](const Turn & turn, size_t number) {
        const auto some = turn_segments(model.bundle.prompt, number, keys(turn), turn.question, system_);
        segments.insert(segments.end(), some.begin(), some.end());
        if (&turn == next) {
            return;
        }
        segments.push_back(turn.given ? Segment{ Segment::Kind::User, turn.answer, {} } : Segment{ Segment::Kind::Answer, "", turn.ids });
    };
    for (size_t i = 0; i < turns.size(); i++) {
        add(turns[i], i);
    }
    if (next != nullptr) {
        add(*next, turns.size());
    }
    return model.tokenizer.units(segments);
}

Pictures Session::pictures(const Turn * next) const {
    Pictures found;
    for (const Turn & turn : turns) {
        found.insert(turn.pictures.begin(), turn.pictures.end());
    }
    if (next != nullptr) {
        found.insert(next->pictures.begin(), next->pictures.end());
    }
    return found;
}

void Session::truncate(size_t n_turns) {
    if (n_turns > turns.size()) {
        fail(LLAVA_EDGE_INVALID_ARGUMENT, "n_turns is %zu; the session has %zu", n_turns, turns.size());
    }
    turns.resize(n_turns);
    turn_count = static_cast<int>(n_turns);
    pending_.clear();
    question_.clear();
    asked_ = false;
}

void Session::stop() {
    const uint64_t latest = calls.load();
    uint64_t       known  = stopped.load();
    while (known < latest && !stopped.compare_exchange_weak(known, latest)) {
    }
}

void Session::reset() {
    truncate(0);
    system_.reset();
}

}  // namespace llava_edge
